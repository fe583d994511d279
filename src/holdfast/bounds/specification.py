"""What is asked of the outputs: the margins z_y − z_j, merged into the last layer where that is dense."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.bounds.interval import Interval
from holdfast.bounds.linear import Sweep, intervals
from holdfast.bounds.operators import Graph, Linear
from holdfast.bounds.region import Region


def margin_rows(y: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """The rows e_y − e_j of each example, classes j ≠ y ascending, (N, K−1, K)."""
    classes = torch.arange(num_classes - 1, device=y.device)
    others = classes + (classes >= y[:, None])
    return (F.one_hot(y, num_classes)[:, None] - F.one_hot(others, num_classes)).to(dtype)


def interval_margins(graph: Graph, region: Region, y: Tensor) -> Tensor:
    """Lower bounds of z_y − z_j for the classes j ≠ y ascending, (N, K−1), by intervals."""
    return interval_margins_at(graph, intervals(graph, region, before_the_end(graph)), y).lower


def interval_margins_at(graph: Graph, values: list[Interval], y: Tensor) -> Interval:
    """The intervals of z_y − z_j, (N, K−1), given those of the values before the logits.

    With a dense last layer W the rows W_y − W_j are bounded in one step (last-layer elision): tighter
    than the difference of the logits' bounds, since what the two logits share cancels.
    """
    last = graph.nodes[-1]
    if not isinstance(last.operator, Linear):
        logits = values[len(graph.nodes)]
        rows = margin_rows(y, logits.centre.shape[1], logits.centre.dtype)
        return Interval(_apply(rows, logits.centre), _apply(rows.abs(), logits.radius))
    hidden = values[last.inputs[0]]
    logits_of_centre = last.operator.forward(hidden.centre)
    rows = margin_rows(y, logits_of_centre.shape[1], logits_of_centre.dtype)
    # A product with the rows, not an indexing of W by y: its backward pass adds in a fixed order.
    return Interval(_apply(rows, logits_of_centre), _apply((rows @ last.operator.weight).abs(), hidden.radius))


def linear_margins(graph: Graph, region: Region, done: Sweep, y: Tensor) -> Tensor:
    """Lower bounds of z_y − z_j for the classes j ≠ y ascending, (N, K−1), by one backward pass."""
    rows = margin_rows(y, graph.shape(len(graph.nodes))[0], region.box.centre.dtype)
    return done.bound(graph, region, len(graph.nodes), rows)


def fused_robust_sum(graph: Graph, region: Region, done: Sweep, y: Tensor) -> tuple[Tensor, Tensor]:
    """An upper bound of Σ_j exp(−m_j) over the region, by one backward pass in place of K − 1 (loss fusion,
    Xu et al., 2020); as (sum, shift), the bound being sum · exp(shift), (N,) each.

    With l_j ≤ −m_j ≤ u_j by intervals, each exponential lies below its chord on [l_j, u_j]; the sum of the chords
    is one linear function of the logits.
    """
    margins = interval_margins_at(graph, done.values, y)
    low, high = -margins.upper, -margins.lower
    shift = high.amax(1, keepdim=True).clamp(min=0).detach()
    width = (high - low).clamp(min=1e-6)
    # (e^u − e^l) / (u − l), towards the tangent's slope where the interval is a point
    slope = (high - shift).exp() * (-torch.expm1(-width)) / width
    constant = ((high - shift).exp() - slope * high).sum(1)
    rows = margin_rows(y, graph.shape(len(graph.nodes))[0], slope.dtype)
    a = torch.bmm(slope[:, None], rows)  # Σ_j slope_j (e_y − e_j): the chord's linear part is −⟨a, z⟩
    linear = done.bound(graph, region, len(graph.nodes), a)[:, 0]
    return constant - linear, shift.squeeze(1)


def robust_cross_entropy(margins: Tensor) -> Tensor:
    """log(1 + Σ_j exp(−m_j)) of each example, (N,): the cross-entropy of the worst logits.

    Args:
        margins: lower bounds of z_y − z_j for the classes j ≠ y, (N, K−1).
    """
    return F.softplus(torch.logsumexp(-margins, 1))


def before_the_end(graph: Graph) -> int | None:
    """Where a sweep for margins may stop: a dense last layer is merged with them."""
    return len(graph.nodes) - 1 if isinstance(graph.nodes[-1].operator, Linear) else None


def _apply(rows: Tensor, vectors: Tensor) -> Tensor:
    """The product of each example's matrix and vector: (N, M, d), (N, d) → (N, M)."""
    return torch.bmm(rows, vectors[:, :, None])[:, :, 0]
