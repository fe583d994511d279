"""What is asked of the outputs: the margins z_y − z_j, merged into the affine end of the network."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.bounds import budget
from holdfast.bounds.differences import combined, differences, reach, sums
from holdfast.bounds.interval import Interval
from holdfast.bounds.linear import Sweep, intervals
from holdfast.bounds.operators import Graph
from holdfast.bounds.region import Box, Region
from holdfast.bounds.rounding import STEPS, Bound
from holdfast.bounds.tail import tail_of


def margin_rows(y: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """The rows e_y − e_j of each example, classes j ≠ y ascending, (N, K−1, K)."""
    classes = torch.arange(num_classes - 1, device=y.device)
    others = classes + (classes >= y[:, None])
    return (F.one_hot(y, num_classes)[:, None] - F.one_hot(others, num_classes)).to(dtype)


def interval_margins(graph: Graph, region: Region, y: Tensor) -> Bound:
    """Lower bounds of z_y − z_j for the classes j ≠ y ascending, (N, K−1), by intervals."""
    found = interval_margins_at(graph, region, interval_values(graph, region), y)
    return Bound(found.lower, found.slack)


def interval_values(graph: Graph, region: Region) -> dict[int, Interval]:
    """The intervals of the values that those of the margins follow from."""
    return intervals(graph, region, tail_of(graph, region.box.centre).stop)


def interval_margins_at(graph: Graph, region: Region, values: dict[int, Interval], y: Tensor) -> Rows:
    """The intervals of z_y − z_j, (N, K−1), given those of the values before the affine end of the graph.

    With a dense last layer W the rows W_y − W_j are bounded in one step (last-layer elision): tighter
    than the difference of the logits' bounds, since what the two logits share cancels.
    """
    return _interval_of(graph, region, values, _Margins(y))


class Rows(NamedTuple):
    """What intervals know of linear functions of the logits."""

    interval: Interval
    """(N, M)."""
    slack: Tensor | None
    """Of its lower end (see ``Bound``)."""

    @property
    def lower(self) -> Tensor:
        return self.interval.lower


def interval_of_rows(graph: Graph, region: Region, values: dict[int, Interval], rows: Tensor) -> Rows:
    """The intervals of linear functions of the logits, (N, M).

    Args:
        values: at least those of ``interval_values``.
        rows: (N, M, K), or (1, M, K) for all examples.
    """
    return _interval_of(graph, region, values, _Functions(rows))


class _Asked(Protocol):
    """M linear functions of the logits of each example."""

    def of(self, logits: Tensor) -> Tensor:
        """Their values, (N, M), at logits (N, K)."""

    def sizes(self, sizes: Tensor) -> Tensor:
        """What they sum where the logits are of these sizes, (N, K); (N, M)."""

    def reach(self, matrix: Tensor, radius: Tensor) -> Tensor:
        """By how much they may change with the values before a matrix (K, d), which do by (N, d); (N, M)."""

    def rows(self, logits: Tensor) -> Tensor:
        """(N, M, K), for logits (N, K)."""


@dataclass(frozen=True)
class _Margins:
    """z_y − z_j for j ≠ y."""

    y: Tensor

    def of(self, logits: Tensor) -> Tensor:
        return differences(logits, self.y)

    def sizes(self, sizes: Tensor) -> Tensor:
        return sums(sizes, self.y)

    def reach(self, matrix: Tensor, radius: Tensor) -> Tensor:
        return reach(matrix, radius, self.y)

    def rows(self, logits: Tensor) -> Tensor:
        return margin_rows(self.y, logits.shape[1], logits.dtype)


@dataclass(frozen=True)
class _Functions:
    """Any, (N, M, K), or (1, M, K) for all examples."""

    matrix: Tensor

    def of(self, logits: Tensor) -> Tensor:
        return _apply(self.matrix, logits)

    def sizes(self, sizes: Tensor) -> Tensor:
        return _apply(self.matrix.abs(), sizes)

    def reach(self, matrix: Tensor, radius: Tensor) -> Tensor:
        return _apply((self.matrix @ matrix).abs(), radius)

    def rows(self, logits: Tensor) -> Tensor:
        return self.matrix


def _interval_of(graph: Graph, region: Region, values: dict[int, Interval], asked: _Asked) -> Rows:
    tail = tail_of(graph, values[0].centre)
    logits = tail.logits({source: values[source].centre for source in tail.sources})
    centre = asked.of(logits)
    below = above = torch.zeros_like(centre)
    for source, matrix in tail.matrices(centre).items():
        if source or isinstance(region, Box):
            spread = asked.reach(matrix, values[source].radius.flatten(1))
            below, above = below + spread, above + spread
        else:  # the ball itself, not the box around it
            a = (asked.rows(logits) @ matrix).expand(len(centre), -1, -1)
            middle, shaped = _apply(a, values[0].centre.flatten(1)), a.unflatten(2, graph.input_shape)
            least, most = region.minimum(shaped), region.minimum(-shaped)
            below, above = below + (middle - least.lower), above - (most.lower + middle)
            if least.slack is not None and most.slack is not None:
                below, above = below + least.slack, above + most.slack
    centre, radius = centre + (above - below) / 2, (above + below) / 2
    if (rounding := region.rounding) is None:
        return Rows(Interval(centre, radius), None)
    error = tail.error(asked.sizes, {source: values[source].size for source in tail.sources}, rounding)
    radius = rounding.up(radius + error) + rounding.gamma(STEPS) * (centre.abs() + radius)
    return Rows(Interval(centre, radius, rounding), error * len(graph.nodes) / 8)  # every node has widened it


def linear_margins(graph: Graph, region: Region, done: Sweep, y: Tensor) -> Bound:
    """Lower bounds of z_y − z_j for the classes j ≠ y ascending, (N, K−1), by one backward pass."""
    classes, like = graph.shape(len(graph.nodes))[0], region.box.centre
    return linear_bounds(graph, region, done, lambda some: margin_rows(y[some], classes, like.dtype), classes - 1)


def linear_bounds(
    graph: Graph, region: Region, done: Sweep, rows: Callable[[Tensor], Tensor], functions: int
) -> Bound:
    """Lower bounds of functions of the logits, (N, M), by a backward pass; where nothing is differentiated a few of
    them at a time.

    Args:
        rows: numbers of n examples ↦ their functions (n, M, ...).
        functions: M.
    """
    last, like = len(graph.nodes), region.box.centre
    room = max(1, budget.of_pass(like) // max(math.prod(graph.shape(value)) for value in range(last + 1)))
    everyone = torch.arange(len(like), device=like.device)
    if torch.is_grad_enabled() or len(like) * functions <= room:
        return done.bound(graph, region, last, rows(everyone))
    found = []
    for some in everyone.split(max(1, room // max(1, functions))):
        part, place = done.take(some), region.take(some)
        pieces = [part.bound(graph, place, last, a) for a in rows(some).split(room, 1)]
        found.append(Bound.joined(pieces, 1))
    return Bound.joined(found, 0)


def fused_robust_sum(graph: Graph, region: Region, done: Sweep, y: Tensor) -> tuple[Tensor, Tensor]:
    """An upper bound of Σ_j exp(−m_j) over the region, by one backward pass in place of K − 1 (loss fusion,
    Xu et al., 2020); as (sum, shift), the bound being sum · exp(shift), (N,) each.

    With l_j ≤ −m_j ≤ u_j by intervals, each exponential lies below its chord on [l_j, u_j]; the sum of the chords
    is one linear function of the logits. Where the intervals are narrow (widths to about 3) it is tighter than the
    margins one by one, which need not be worst at the same input. Where they are wide the chord is about
    e^u (−m − l) / (u − l): its logarithm falls below the interval's own u by log (u − l) / (−m − l) and no more,
    whatever the backward pass finds of m. Of what the single margins gain over intervals the fused sum keeps a
    third at widths near 8, a tenth near 24 and a fiftieth near 70 (digits, networks trained by cross-entropy or
    CROWN-IBP). A second pass on the new upper ends gains as little again: no linear function lies closer above
    these exponentials on their box.
    """
    margins = interval_margins_at(graph, region, done.values, y).interval
    low, high = -margins.upper, -margins.lower
    shift = high.amax(1, keepdim=True).clamp(min=0).detach()
    width = (high - low).clamp(min=1e-6)
    # (e^u − e^l) / (u − l), towards the tangent's slope where the interval is a point
    slope = (high - shift).exp() * (-torch.expm1(-width)) / width
    constant = ((high - shift).exp() - slope * high).sum(1)
    a = combined(slope, y, graph.shape(len(graph.nodes))[0])  # the chord's linear part is −⟨a, z⟩
    linear = done.bound(graph, region, len(graph.nodes), a[:, None]).lower[:, 0]
    return constant - linear, shift.squeeze(1)


def robust_cross_entropy(margins: Tensor) -> Tensor:
    """log(1 + Σ_j exp(−m_j)) of each example, (N,): the cross-entropy of the worst logits.

    Args:
        margins: lower bounds of z_y − z_j for the classes j ≠ y, (N, K−1).
    """
    return F.softplus(torch.logsumexp(-margins, 1))


def _apply(rows: Tensor, vectors: Tensor) -> Tensor:
    """The product of each example's matrix, or of one for all, and vector: (N, M, d), (N, d) → (N, M)."""
    return torch.bmm(rows.expand(len(vectors), -1, -1), vectors[:, :, None])[:, :, 0]
