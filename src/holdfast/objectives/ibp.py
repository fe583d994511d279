"""Certified training by interval bound propagation."""

from __future__ import annotations

from pydantic import Field

from holdfast.bounds import robust_cross_entropy
from holdfast.bounds.specification import interval_margins_at, interval_values
from holdfast.objectives.certified import Batch, CertifiedTraining, Robust


class IBP(CertifiedTraining, name="ibp"):
    """Cross-entropy of the interval bound's worst logits (Gowal et al., 2018), mixed with the clean one.

    With ``initialisation: shi`` and a ``regularisation`` it is the fast form of Shi et al. (2021).
    """

    kappa: float = Field(default=0.5, ge=0, le=1)
    """Weight of the clean loss at the end of the ramp."""

    def robust(self, batch: Batch) -> Robust:
        values = interval_values(batch.graph, batch.region)
        margins = interval_margins_at(batch.graph, batch.region, values, batch.y).lower
        return Robust(robust_cross_entropy(margins), values)
