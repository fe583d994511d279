"""Certified training by interval bound propagation."""

from __future__ import annotations

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from holdfast.bounds import Graph, Interval, Rectifier, robust_cross_entropy
from holdfast.bounds.specification import interval_margins_at, interval_values
from holdfast.objectives.certified import Batch, CertifiedTraining, Robust


class IBP(CertifiedTraining, name="ibp"):
    """Cross-entropy of the interval bound's worst logits (Gowal et al., 2018), mixed with the clean one.

    With ``initialisation: shi`` and a ``regularisation`` it is the fast form of Shi et al. (2021).
    """

    kappa: float = Field(default=0.5, ge=0, le=1)
    """Weight of the clean loss at the end of the ramp."""
    regularisation: NonNegativeFloat = 0.0
    """Weight of the regulariser where the ramp begins; it falls to 0 along it. Shi et al. take 0.5."""
    tolerance: float = Field(default=0.5, gt=0, le=1)
    """What the regulariser leaves alone: intervals up to 1 / tolerance times as wide as the input's, and ratios of
    active to inactive neurons down to it."""

    def robust(self, batch: Batch) -> Robust:
        values = interval_values(batch.graph, batch.region)
        loss = robust_cross_entropy(interval_margins_at(batch.graph, batch.region, values, batch.y).lower)
        weight = self.regularisation * (1 - batch.ramp)
        extra = weight * interval_regulariser(batch.graph, values, self.tolerance) if weight else None
        return Robust(loss, extra)


def interval_regulariser(graph: Graph, values: list[Interval], tolerance: float) -> Tensor:
    """Tightness and balance of Shi et al. (2021, section 3.2), a scalar.

    Over the inputs of the ReLUs: max(0, τ − E Δ₀ / E Δ_i) / τ for the mean widths Δ; and max(0, τ − r) / τ for two
    ratios r ≤ 1 of active to inactive neurons, of their summed centres and of their share in the variance.
    """
    read = [node.inputs[0] for node in graph.nodes if isinstance(node.operator, Rectifier)]
    terms = []
    for number in (n for n in read if n < len(values)):
        value = values[number]
        width = value.radius.mean().clamp(min=1e-12)
        terms.append((tolerance - values[0].radius.mean() / width).clamp(min=0))
        active, inactive = value.lower >= 0, value.upper <= 0
        spread = (value.centre - value.centre.mean()).square()
        pairs = (
            ((value.centre * active).mean(), -(value.centre * inactive).mean()),
            ((spread * active).sum(), (spread * inactive).sum()),
        )
        for first, second in pairs:
            ratio = first.clamp(min=1e-12) / second.clamp(min=1e-12)
            terms.append((tolerance - torch.minimum(ratio, 1 / ratio)).clamp(min=0))
    return torch.stack(terms).sum() / (tolerance * max(1, len(read))) if terms else values[0].centre.new_zeros(())
