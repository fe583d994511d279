"""Certified training by interval bound propagation."""

from __future__ import annotations

from collections.abc import Callable

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
        extra = (
            weight * interval_regulariser(batch.graph, values, self.tolerance, batch.progress.mean)
            if weight
            else None
        )
        return Robust(loss, extra)


def interval_regulariser(
    graph: Graph, values: dict[int, Interval], tolerance: float, mean: Callable[[Tensor], Tensor] = lambda own: own
) -> Tensor:
    """Tightness and balance of Shi et al. (2021, section 3.2), a scalar.

    Over the inputs of the ReLUs: max(0, τ − E Δ₀ / E Δ_i) / τ for the mean widths Δ; and max(0, τ − r) / τ for two
    ratios r ≤ 1 of active to inactive neurons, of their summed centres and of their share in the variance.

    Args:
        mean: means over a batch that several processes share, from those over the examples at hand.
    """
    read = [node.inputs[0] for node in graph.nodes if isinstance(node.operator, Rectifier)]
    inner = [values[n] for n in read if n in values]
    if not inner:
        return values[0].centre.new_zeros(())
    masks = [(value.lower >= 0, value.upper <= 0) for value in inner]
    first = [values[0].radius.mean()]
    for value, (active, inactive) in zip(inner, masks, strict=True):
        centre = value.centre
        first += [value.radius.mean(), centre.mean(), (centre * active).mean(), -(centre * inactive).mean()]
    width, *of_layers = mean(torch.stack(first)).unbind()
    second = []
    for value, centre, both in zip(inner, of_layers[1::4], masks, strict=True):
        spread = (value.centre - centre).square()
        second += [(spread * mask).mean() for mask in both]
    spreads = mean(torch.stack(second)).unbind()
    terms = [(tolerance - width / own.clamp(min=1e-12)).clamp(min=0) for own in of_layers[::4]]
    pairs = [*zip(of_layers[2::4], of_layers[3::4], strict=True), *zip(spreads[::2], spreads[1::2], strict=True)]
    for active, inactive in pairs:
        ratio = active.clamp(min=1e-12) / inactive.clamp(min=1e-12)
        terms.append((tolerance - torch.minimum(ratio, 1 / ratio)).clamp(min=0))
    return torch.stack(terms).sum() / (tolerance * len(read))
