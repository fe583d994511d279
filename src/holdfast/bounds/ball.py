"""The domain of balls cut with boxes (BCP; Lee et al., 2020), in l_2.

Every value lies within ``radius`` of ``centre`` in l_2, and in a box. The ball grows by operator norms and
knows how the coordinates hang together; the box knows each by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor

from holdfast.bounds.heads import constant_of
from holdfast.bounds.interval import Interval, rule
from holdfast.bounds.operators import (
    Affine,
    Concatenate,
    Convolution,
    Elementwise,
    Graph,
    Linear,
    LipschitzMap,
    MaxPool,
    Operator,
    PairwiseMax,
    Sum,
    UnsupportedOperator,
    apply,
    computed,
    transposed,
    walk,
)
from holdfast.bounds.region import Ball, Region
from holdfast.bounds.specification import margin_rows
from holdfast.bounds.tail import Tail, tail_of
from holdfast.layers.operator_norm import convolution_norm, dense_norm, is_small, matrix_norm, power_iteration
from holdfast.norms import L2
from holdfast.search import per_example

Gains = dict[int, Tensor]
"""Operator norm of each affine node, by its number."""


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
        return CutBall(self.centre, self.radius, self.box.intersect(self.centre - reach, self.centre + reach))


@singledispatch
def advance(operator: Operator, gain: Tensor | None, *values: CutBall) -> CutBall:
    """The ball and box of an operator's result; a new kind registers here."""
    raise UnsupportedOperator(f"{type(operator).__name__} has no rule for balls; crown or ibp may do")


@advance.register
def _(operator: Affine, gain: Tensor, value: CutBall) -> CutBall:
    centre = operator.forward(value.centre)
    box = rule(operator, value.box)
    rows = operator.row_lengths(value.centre, tuple(value.centre.shape[1:]), 2.0)
    return CutBall(centre, value.radius * gain, box).cut(per_example(value.radius, centre) * rows)


@advance.register(Elementwise)
@advance.register(MaxPool)
@advance.register(PairwiseMax)
@advance.register(LipschitzMap)
def _(operator: Operator, gain: None, value: CutBall) -> CutBall:
    """A function whose Lipschitz constant is known, and which intervals can bound."""
    return CutBall(apply(operator, value.centre), _radius(operator, None, value.radius), rule(operator, value.box))


@advance.register
def _(operator: Sum, gain: None, first: CutBall, second: CutBall) -> CutBall:
    centre = first.centre + operator.sign * second.centre
    radius = _radius(operator, None, first.radius, second.radius)
    return CutBall(centre, radius, rule(operator, first.box, second.box)).cut(per_example(radius, centre))


@advance.register
def _(operator: Concatenate, gain: None, *values: CutBall) -> CutBall:
    return CutBall(
        torch.cat([value.centre for value in values], operator.dim),
        _radius(operator, None, *(value.radius for value in values)),
        rule(operator, *(value.box for value in values)),
    )


def cut_balls(graph: Graph, region: Region, gains: Gains, stop: int | None = None) -> list[CutBall]:
    """Ball and box of every value, or of those up to number ``stop``."""

    def step(number: int, operator: Operator, *values: CutBall) -> CutBall:
        return advance(operator, gains.get(number), *values)

    return list(walk(graph, {0: _start(region)}, step, range(len(graph.nodes))[:stop]).values())


def _start(region: Region) -> CutBall:
    """The l_2 ball of the region itself, or the one around its box."""
    box = region.box
    if isinstance(region, Ball):
        return CutBall(region.x, region.eps * region.threat.euclidean_eps(math.prod(region.x.shape[1:])), box)
    return CutBall(box.centre, box.radius.flatten(1).norm(dim=1), box)


def ball_margins(graph: Graph, region: Region, y: Tensor, gains: Gains) -> Tensor:
    """Lower bounds of z_y − z_j for the classes j ≠ y ascending, (N, K−1).

    The centre's own margin less the exact worst translation max ⟨W_j − W_y, p⟩ over ball ∩ box, W the matrix of the
    affine end; sound for any radius that is not too small, and differentiable.
    """
    tail = tail_of(graph, region.box.centre)
    values = cut_balls(graph, region, gains, tail.stop)
    margins, rows = _at_the_end(tail, {source: values[source].centre for source in tail.sources}, y)
    classes = margins.shape[1]
    for source, each in rows.items():
        known, direction = values[source], -each.flatten(0, 1)
        above, below = known.box.upper - known.centre, known.centre - known.box.lower
        above, below = (room.flatten(1).clamp(min=0).repeat_interleave(classes, 0) for room in (above, below))
        room = torch.where(direction > 0, above, below)
        reach = L2.support(direction.abs(), known.radius.repeat_interleave(classes)[:, None], room)
        margins = margins - reach.view_as(margins)
    return margins


def lipschitz_margins(graph: Graph, region: Region, y: Tensor, gains: Gains) -> Tensor:
    """The same by the ball alone: z_y − z_j − r ‖W_y − W_j‖₂, the pairwise form of Lipschitz-margin training."""
    tail, radii = tail_of(graph, region.box.centre), ball_radii(graph, region, gains)
    margins, rows = _at_the_end(tail, computed(graph, {0: ball_centre(region)}, range(tail.stop)), y)
    for source, each in rows.items():
        margins = margins - radii[source][:, None] * each.norm(dim=2)
    return margins


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
        return _grown(graph, one, gains | {n: node_gain(graph, n, like) for n in _affine(graph, tail.inner)}, None)[
            -1
        ]
    radii, matrices = _grown(graph, one, gains, tail.stop), tail.matrices(like)
    slack = 1 + 1e-5 * (len(tail.inner) > 1)  # products of matrices in the model's own precision
    each = torch.stack([radii[source] for source in tail.sources])
    norms = torch.stack([matrix_norm(matrices[source].detach()) for source in tail.sources])
    together = each.norm() * matrix_norm(torch.cat(list(matrices.values()), 1).detach())
    constant = torch.minimum((each * norms).sum(), together) * slack
    return constant * constant_of(graph.heads, graph.shape(len(graph.nodes))[0])


def lipschitz_radii(graph: Graph, x: Tensor, y: Tensor, gains: Gains) -> Tensor:
    """The l_2 radius within which z_y stays above every other z_j, (N,) float64; negative where it is not.

    min_j (z_y − z_j) / (L ‖W_y − W_j‖₂) with L the constant up to the affine end and W the matrix of it; where it
    begins at several values, their L ‖W_y − W_j‖₂ add up.
    """
    tail = tail_of(graph, x)
    margins, rows = _at_the_end(tail, computed(graph, {0: x}, range(tail.stop)), y)
    constants = _grown(graph, torch.ones((), dtype=torch.float64, device=x.device), gains, tail.stop)
    slopes = sum(constants[source] * each.double().norm(dim=2) for source, each in rows.items())
    assert isinstance(slopes, Tensor)
    # Equal rows make equal logits but for the bias: what is positive then stays so.
    return (margins.double() / slopes.clamp(min=1e-30)).amin(1)


def _at_the_end(tail: Tail, centres: dict[int, Tensor], y: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    """The margins at the centres, (N, K−1), and the rows W_y − W_j at each value, (N, K−1, its entries)."""
    logits = tail.logits(centres)
    rows = margin_rows(y, logits.shape[1], logits.dtype)
    margins = torch.bmm(rows, logits[:, :, None])[:, :, 0]
    return margins, {source: rows @ matrix for source, matrix in tail.matrices(logits).items()}


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
        return torch.stack(radii).norm(dim=0)
    raise UnsupportedOperator(f"{type(operator).__name__} has no Lipschitz constant; crown or ibp may do")


def certified_gains(graph: Graph, like: Tensor) -> Gains:
    """Upper bounds of the operator norms before the affine end, in float64."""
    return {number: node_gain(graph, number, like) for number in _before_the_end(graph, like)}


def estimated_gains(graph: Graph, like: Tensor, iterations: int = 10) -> Gains:
    """Power iteration: from below, differentiable in the weights; for training losses only."""
    return {number: _estimated(graph, number, like, iterations) for number in _before_the_end(graph, like)}


def _before_the_end(graph: Graph, like: Tensor) -> list[int]:
    """The affine nodes but those that are merged with the specification."""
    return _affine(graph, range(tail_of(graph, like).stop))


def _affine(graph: Graph, numbers: Iterable[int]) -> list[int]:
    return [n for n in numbers if isinstance(graph.nodes[n].operator, Affine)]


@torch.no_grad()
def node_gain(graph: Graph, number: int, like: Tensor) -> Tensor:
    """At least the operator norm of an affine node, in float64."""
    operator, shape = graph.nodes[number].operator, graph.shape(graph.nodes[number].inputs[0])
    assert isinstance(operator, Affine)
    if operator.norm:
        return like.new_tensor(operator.norm(), dtype=torch.float64)
    if isinstance(operator, Linear):
        return matrix_norm(operator.weight)
    if isinstance(operator, Convolution):
        exact = Convolution(
            operator.weight.double(), None, operator.stride, operator.padding, operator.dilation, operator.groups
        )
        zero = exact.weight.new_zeros(1, *shape)
        if is_small(exact.forward, zero):
            return dense_norm(exact.forward, zero)
        return convolution_norm(operator.weight, operator.stride, operator.dilation, operator.groups)
    zero = like.new_zeros(1, *shape)
    if not operator.entrywise and is_small(operator.forward, zero):
        # Through the adjoint, in which the bias has no part; in the model's own precision.
        outputs = graph.nodes[number].shape
        one = torch.eye(math.prod(outputs), dtype=like.dtype, device=like.device).view(-1, *outputs)
        rows = [transposed(operator.forward, part, shape).flatten(1) for part in one.split(512)]
        return matrix_norm(torch.cat(rows)) * (1 + 1e-5)
    # Rows and columns with a single entry each: exact but for the last place.
    slack = 8 * torch.finfo(like.dtype).eps if operator.entrywise else 1e-5
    return operator.gain(zero, shape, 2.0) * (1 + slack)


def _estimated(graph: Graph, number: int, like: Tensor, iterations: int) -> Tensor:
    operator, shape = graph.nodes[number].operator, graph.shape(graph.nodes[number].inputs[0])
    assert isinstance(operator, Affine)
    zero = like.new_zeros(1, *shape)
    if operator.entrywise:
        return operator.gain(zero, shape, 2.0)
    return power_iteration(operator.forward, zero, iterations=iterations)
