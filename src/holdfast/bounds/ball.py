"""The domain of balls cut with boxes (BCP; Lee et al., 2020), in l_2.

Every value lies within ``radius`` of ``centre`` in l_2, and in a box. The ball grows by operator norms and
knows how the coordinates hang together; the box knows each by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor

from holdfast.bounds.cut import Cut
from holdfast.bounds.differences import differences, sums
from holdfast.bounds.gains import Gains, affine_nodes, node_gain
from holdfast.bounds.heads import constant_of
from holdfast.bounds.interval import Interval, image
from holdfast.bounds.operators import (
    Affine,
    Concatenate,
    Elementwise,
    Graph,
    LipschitzMap,
    MaxPool,
    Operator,
    PairwiseMax,
    Rectifier,
    Sum,
    UnsupportedOperator,
    apply,
    lengths,
    walk,
)
from holdfast.bounds.region import Ball, Region
from holdfast.bounds.rounding import STEPS, Bound, Rounding
from holdfast.bounds.specification import margin_rows
from holdfast.bounds.tail import Tail, tail_of
from holdfast.layers.operator_norm import matrix_norm
from holdfast.norms import L2
from holdfast.search import per_example

UNASKED_ROUNDS = 4
"""Of the climb to the worst translation in training, where to ask whether it has arrived is to wait for the device;
two are usual, and to stop early only loosens."""


@dataclass(frozen=True)
class CutBall:
    """{v: ‖v − centre‖₂ ≤ radius} ∩ box for each of N examples."""

    centre: Tensor
    """(N, ...); what the network computes from the centre of the input region."""
    radius: Tensor
    """(N,)."""
    box: Interval
    """(N, ...)."""

    def cut(self, reach: Tensor) -> CutBall:
        """With the box narrowed to centre ± reach."""
        if self.box.rounding is None:
            return CutBall(self.centre, self.radius, Cut(self.box, self.centre, reach))
        around = Interval(self.centre, reach, self.box.rounding)
        return CutBall(self.centre, self.radius, self.box.intersect(around.lower, around.upper))


@singledispatch
def advance(operator: Operator, gain: Tensor | None, *values: CutBall) -> CutBall:
    """The ball and box of an operator's result; a new kind registers here."""
    raise UnsupportedOperator(f"{type(operator).__name__} has no rule for balls; crown or ibp may do")


@advance.register
def _(operator: Affine, gain: Tensor, value: CutBall) -> CutBall:
    ball, error = _image(operator, gain, value)
    rows = operator.row_lengths(value.centre, tuple(value.centre.shape[1:]), 2.0)
    reach = per_example(value.radius, ball.centre) * rows
    if (rounding := value.box.rounding) is not None:
        reach = rounding.up(reach, math.prod(value.centre.shape[1:])) + error
    return ball.cut(reach)


@advance.register(Elementwise)
@advance.register(MaxPool)
@advance.register(PairwiseMax)
@advance.register(LipschitzMap)
def _(operator: Operator, gain: None, value: CutBall) -> CutBall:
    """A function whose Lipschitz constant is known, and which intervals can bound."""
    return _image(operator, None, value)[0]


@advance.register
def _(operator: Sum, gain: None, first: CutBall, second: CutBall) -> CutBall:
    ball, _ = _image(operator, None, first, second)
    return ball.cut(per_example(ball.radius, ball.centre))


@advance.register
def _(operator: Concatenate, gain: None, *values: CutBall) -> CutBall:
    return _image(operator, None, *values)[0]


def _image(operator: Operator, gain: Tensor | None, *values: CutBall) -> tuple[CutBall, Tensor]:
    """The ball and the box of a result, each by itself, and what computing the centre may err by, entry by
    entry."""
    box = _box(operator, *(value.box for value in values))
    centre, radius, error = _ball(operator, gain, box.rounding, *((value.centre, value.radius) for value in values))
    return CutBall(centre, radius, box), error


def _box(operator: Operator, *values: Interval) -> Interval:
    """The box of a result."""
    if isinstance(operator, Rectifier) and not operator.leak and isinstance(values[0], Cut):
        return values[0].rectified()
    return image(operator, *values)


def _ball(
    operator: Operator, gain: Tensor | None, rounding: Rounding | None, *values: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Centre and radius of the ball that holds a result, and what computing the centre may err by, entry by entry:
    the ball is around the centre as it is computed, and grows by the length of that error."""
    radius = _radius(operator, gain, *(radius for _, radius in values))
    if rounding is None:
        return apply(operator, *(centre for centre, _ in values)), radius, torch.zeros_like(radius)
    point = image(operator, *(Interval.point(centre, rounding) for centre, _ in values))
    length = lengths(point.radius.flatten(1))
    return (
        point.centre,
        rounding.up(radius + length, 2 * STEPS + math.prod(point.centre.shape[1:])),
        point.radius,
    )


def _balls(
    graph: Graph, centre: Tensor, radius: Tensor, gains: Gains, rounding: Rounding | None, stop: int
) -> dict[int, tuple[Tensor, Tensor]]:
    """Centre and radius of the ball alone at every value up to number ``stop``."""

    def step(number: int, operator: Operator, *values: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return _ball(operator, gains.get(number), rounding, *values)[:2]

    return walk(graph, {0: (centre, radius)}, step, range(stop))


def cut_balls(graph: Graph, region: Region, gains: Gains, stop: int | None = None) -> list[CutBall]:
    """Ball and box of every value, or of those up to number ``stop``."""

    def step(number: int, operator: Operator, *values: CutBall) -> CutBall:
        return advance(operator, gains.get(number), *values)

    return list(walk(graph, {0: _start(region)}, step, range(len(graph.nodes))[:stop]).values())


def _start(region: Region) -> CutBall:
    """The l_2 ball of the region itself, or the one around its box."""
    box, rounding = region.box, region.rounding
    if isinstance(region, Ball):
        radius = region.eps * region.threat.euclidean_eps(math.prod(region.x.shape[1:]))
        return CutBall(region.x, rounding.up(radius) if rounding else radius, box)
    radius = lengths(box.radius.flatten(1))
    return CutBall(box.centre, rounding.up(radius, math.prod(box.centre.shape[1:])) if rounding else radius, box)


def ball_margins(graph: Graph, region: Region, y: Tensor, gains: Gains) -> Bound:
    """Lower bounds of z_y − z_j for the classes j ≠ y ascending, (N, K−1).

    The centre's own margin less the exact worst translation max ⟨W_j − W_y, p⟩ over ball ∩ box, W the matrix of the
    affine end; sound for any radius that is not too small, and differentiable.
    """
    return centred_ball_margins(graph, region, y, gains)[0]


def centred_ball_margins(graph: Graph, region: Region, y: Tensor, gains: Gains) -> tuple[Bound, Tensor]:
    """``ball_margins``, and the margins at ``ball_centre`` that they start from, (N, K−1)."""
    tail, rounding = tail_of(graph, region.box.centre), region.rounding
    values = cut_balls(graph, region, gains, tail.stop)
    end = _End.at(tail, {source: values[source].centre for source in tail.sources}, y)
    classes, reach = end.margins.shape[1], {}
    for source, rows in end.rows.items():
        known, direction = values[source], -rows.flatten(0, 1)
        above, below = known.box.upper - known.centre, known.centre - known.box.lower
        above, below = (room.flatten(1).clamp(min=0).repeat_interleave(classes, 0) for room in (above, below))
        room = torch.where(direction > 0, above, below)
        if rounding is not None:
            room = rounding.up(room)
        radius = known.radius.repeat_interleave(classes)[:, None]
        rounds = UNASKED_ROUNDS if rounding is None and room.device.type != "cpu" else None
        reach[source] = L2.support(direction.abs(), radius, room, rounds).view_as(end.margins)
    sizes = {source: values[source].centre.abs() + values[source].box.size for source in tail.sources}
    return end.less(reach, sizes, rounding), end.margins


def lipschitz_margins(graph: Graph, region: Region, y: Tensor, gains: Gains) -> Bound:
    """The same by the ball alone: z_y − z_j − r ‖W_y − W_j‖₂, the pairwise form of Lipschitz-margin training."""
    return centred_lipschitz_margins(graph, region, y, gains)[0]


def centred_lipschitz_margins(graph: Graph, region: Region, y: Tensor, gains: Gains) -> tuple[Bound, Tensor]:
    """``lipschitz_margins``, and the margins at ``ball_centre`` that they start from, (N, K−1)."""
    tail, start = tail_of(graph, region.box.centre), _start(region)
    balls = _balls(graph, start.centre, start.radius, gains, region.rounding, tail.stop)
    end = _End.at(tail, {source: balls[source][0] for source in tail.sources}, y)
    reach = {source: balls[source][1][:, None] * lengths(rows) for source, rows in end.rows.items()}
    sizes = {source: balls[source][0].abs() + per_example(*reversed(balls[source])) for source in tail.sources}
    return end.less(reach, sizes, region.rounding), end.margins


def ball_centre(region: Region) -> Tensor:
    """The input that the balls are around, (N, ...)."""
    return _start(region).centre


def ball_radii(graph: Graph, region: Region, gains: Gains) -> list[Tensor]:
    """The radius of the ball alone at each value before the affine end, (N,) each."""
    start = _start(region)
    return _grown(graph, start.radius, gains, tail_of(graph, start.centre).stop)


def _grown(graph: Graph, radius: Tensor, gains: Gains, stop: int | None) -> list[Tensor]:
    def step(number: int, operator: Operator, *radii: Tensor) -> Tensor:
        return _radius(operator, gains.get(number), *radii)

    return list(walk(graph, {0: radius}, step, range(len(graph.nodes))[:stop]).values())


def lipschitz_constant(graph: Graph, gains: Gains, like: Tensor) -> Tensor:
    """Of the whole network from l_2 to l_2: products over layers, sums over branches; a float64 scalar.

    Args:
        gains: of ``certified_gains``.
        like: an input.
    """
    tail = tail_of(graph, like)
    one = torch.ones((), dtype=torch.float64, device=like.device)
    if len(graph.shape(len(graph.nodes))) > 1:  # outputs too many for a matrix
        return _grown(
            graph, one, gains | {n: node_gain(graph, n, like) for n in affine_nodes(graph, tail.inner)}, None
        )[-1]
    radii, matrices = _grown(graph, one, gains, tail.stop), tail.matrices(like)
    slack = 1 + 1e-5 * (len(tail.inner) > 1)  # products of matrices in the model's own precision
    each = torch.stack([radii[source] for source in tail.sources])
    norms = torch.stack([matrix_norm(matrices[source].detach()) for source in tail.sources])
    together = each.norm() * matrix_norm(torch.cat(list(matrices.values()), 1).detach())
    constant = torch.minimum((each * norms).sum(), together) * slack
    return constant * constant_of(graph.heads, graph.shape(len(graph.nodes))[0])


def lipschitz_radii(graph: Graph, x: Tensor, y: Tensor, gains: Gains, rounding: Rounding | None = None) -> Tensor:
    """The l_2 radii within which z_y stays above z_j for each j ≠ y, ascending, (N, K−1) float64; negative where it
    is not.

    (z_y − z_j) / (L ‖W_y − W_j‖₂) with L the constant up to the affine end and W the matrix of it; where it
    begins at several values, their L ‖W_y − W_j‖₂ add up. With ``rounding`` it is rounded down, and the margins are
    those that the real network is sure to have at x.
    """
    tail = tail_of(graph, x)
    none = torch.zeros_like(x.flatten(1)[:, 0])
    balls = _balls(graph, x, none, gains, rounding, tail.stop)
    end = _End.at(tail, {source: balls[source][0] for source in tail.sources}, y)
    constants = _grown(graph, torch.ones((), dtype=torch.float64, device=x.device), gains, tail.stop)
    norms = {source: lengths(rows.double()) for source, rows in end.rows.items()}
    if rounding is not None:
        for source in tail.sources:
            norms[source] = rounding.up(norms[source] + end.row_error(source, x, rounding), math.prod(x.shape[1:]))
        strayed = {source: balls[source][1][:, None] * norms[source] for source in tail.sources}
        margins = end.less(strayed, {source: balls[source][0].abs() for source in tail.sources}, rounding).lower
    else:
        margins = end.margins
    slopes = sum(constants[source] * length for source, length in norms.items())
    assert isinstance(slopes, Tensor)
    if rounding is not None:
        slopes = rounding.up(slopes, STEPS * len(graph.nodes))
    # Equal rows make equal logits but for the bias: what is positive then stays so.
    radii = margins.double() / slopes.clamp(min=1e-30)
    return radii if rounding is None else rounding.below(radii)


@dataclass(frozen=True)
class _End:
    """What the affine end makes of the centres before it."""

    tail: Tail
    y: Tensor
    margins: Tensor
    """At the centres, (N, K−1)."""
    rows: dict[int, Tensor]
    """W_y − W_j at each value, (N, K−1, its entries)."""

    @classmethod
    def at(cls, tail: Tail, centres: dict[int, Tensor], y: Tensor) -> _End:
        logits = tail.logits(centres)
        asked = margin_rows(y, logits.shape[1], logits.dtype)
        rows = {source: asked @ matrix for source, matrix in tail.matrices(logits).items()}
        return cls(tail, y, differences(logits, y), rows)

    def less(self, reach: dict[int, Tensor], sizes: dict[int, Tensor], rounding: Rounding | None) -> Bound:
        """The margins less what each value may change of them, (N, K−1) each.

        Args:
            sizes: of the values, (N, ...) each.
        """
        lower = self.margins
        for each in reach.values():
            lower = lower - each
        if rounding is None:
            return Bound(lower)
        # Each reach is a sum of sizes, none of which exceeds it by more than four times.
        entries = max(rows.shape[2] for rows in self.rows.values()) + STEPS
        size = self.margins.abs() + 4 * sum(reach.values())
        slack = self.tail.error(self._summed, sizes, rounding) + rounding.gamma(entries + STEPS) * size
        slack = rounding.up(slack, entries)
        return Bound(lower - slack, slack)

    def row_error(self, source: int, x: Tensor, rounding: Rounding) -> Tensor:
        """What the rows at a value may err by in l_1, and so in l_2, (N, K−1)."""
        one = {s: x.new_full((1, *self.tail.graph.shape(s)), float(s == source)) for s in self.tail.sources}
        return self.tail.error(self._summed, one, rounding)

    def _summed(self, sizes: Tensor) -> Tensor:
        return sums(sizes.expand(len(self.y), -1), self.y)


def _radius(operator: Operator, gain: Tensor | None, *radii: Tensor) -> Tensor:
    if gain is not None:
        return radii[0] * gain
    if isinstance(operator, Elementwise):
        return radii[0] * operator.steepest
    if isinstance(operator, MaxPool) and operator.overlap:
        return radii[0] * math.sqrt(operator.overlap)
    if isinstance(operator, PairwiseMax):
        return radii[0]
    if isinstance(operator, LipschitzMap):
        return radii[0] * operator.constant
    if isinstance(operator, Sum):
        return radii[0] + radii[1]
    if isinstance(operator, Concatenate):
        return lengths(torch.stack(radii, -1))
    raise UnsupportedOperator(f"{type(operator).__name__} has no Lipschitz constant; crown or ibp may do")
