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
    run,
    transposed,
)
from holdfast.bounds.region import Ball, Region
from holdfast.bounds.specification import interval_margins_at, margin_rows
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
    values = [_start(region)]
    for number, node in enumerate(graph.nodes[:stop]):
        values.append(advance(node.operator, gains.get(number), *(values[i] for i in node.inputs)))
    return values


def _start(region: Region) -> CutBall:
    """The l_2 ball of the region itself, or the one around its box."""
    box = region.box
    if isinstance(region, Ball):
        return CutBall(region.x, region.eps * region.threat.euclidean_eps(math.prod(region.x.shape[1:])), box)
    return CutBall(box.centre, box.radius.flatten(1).norm(dim=1), box)


def ball_margins(graph: Graph, region: Region, y: Tensor, gains: Gains) -> Tensor:
    """Lower bounds of z_y − z_j for the classes j ≠ y ascending, (N, K−1).

    With a dense last layer W: the centre's own margin less the exact worst translation
    max ⟨W_j − W_y, p⟩ over ball ∩ box; sound for any radius that is not too small, and differentiable.
    """
    last = graph.nodes[-1]
    if not isinstance(last.operator, Linear):
        values = cut_balls(graph, region, gains)
        boxed = interval_margins_at(graph, [value.box for value in values], y).lower
        rows = margin_rows(y, values[-1].centre.shape[1], boxed.dtype)
        return torch.maximum(boxed, _margins(rows, values[-1].centre) - math.sqrt(2) * values[-1].radius[:, None])
    hidden = cut_balls(graph, region, gains, last.inputs[0])[-1]
    margins, rows = _last_layer(last.operator, hidden.centre, y)
    direction = -rows.flatten(0, 1)
    classes = rows.shape[1]
    above, below = hidden.box.upper - hidden.centre, hidden.centre - hidden.box.lower
    above, below = (room.clamp(min=0).repeat_interleave(classes, 0) for room in (above, below))
    room = torch.where(direction > 0, above, below)
    reach = L2.support(direction.abs(), hidden.radius.repeat_interleave(classes)[:, None], room)
    return margins - reach.view_as(margins)


def lipschitz_margins(graph: Graph, region: Region, y: Tensor, gains: Gains) -> Tensor:
    """The same by the ball alone: z_y − z_j − r ‖W_y − W_j‖₂, the pairwise form of Lipschitz-margin training."""
    last = graph.nodes[-1]
    if not isinstance(last.operator, Linear):
        logits = run(graph, ball_centre(region))
        rows = margin_rows(y, logits.shape[1], logits.dtype)
        return _margins(rows, logits) - math.sqrt(2) * ball_radius(graph, region, gains)[:, None]
    hidden = run(graph, ball_centre(region), stop=last.inputs[0])
    radius = ball_radius(graph, region, gains, last.inputs[0])
    margins, rows = _last_layer(last.operator, hidden, y)
    return margins - radius[:, None] * rows.norm(dim=2)


def ball_centre(region: Region) -> Tensor:
    """The input that the balls are around, (N, ...)."""
    return _start(region).centre


def ball_radius(graph: Graph, region: Region, gains: Gains, stop: int | None = None) -> Tensor:
    """The radius of the ball alone at the last value, or at number ``stop``, (N,)."""
    return _grown(graph, _start(region).radius, gains, stop)


def _grown(graph: Graph, radius: Tensor, gains: Gains, stop: int | None) -> Tensor:
    radii = [radius]
    for number, node in enumerate(graph.nodes[:stop]):
        radii.append(_radius(node.operator, gains.get(number), *(radii[i] for i in node.inputs)))
    return radii[-1]


def lipschitz_constant(graph: Graph, gains: Gains) -> Tensor:
    """Of the whole network from l_2 to l_2: products over layers, sums over branches; a float64 scalar."""
    last, operator = len(graph.nodes) - 1, graph.nodes[-1].operator
    if isinstance(operator, Linear):  # whose gain the margins take pair by pair
        gains = {**gains, last: matrix_norm(operator.weight.detach())}
    return _grown(graph, torch.ones((), dtype=torch.float64), gains, None)


def lipschitz_radii(graph: Graph, x: Tensor, y: Tensor, gains: Gains) -> Tensor:
    """The l_2 radius within which z_y stays above every other z_j, (N,) float64; negative where it is not.

    min_j (z_y − z_j) / (L ‖W_y − W_j‖₂) with L the constant up to a dense last layer W; without one
    min_j (z_y − z_j) / (√2 L).
    """
    last, stop = graph.nodes[-1], None
    if isinstance(last.operator, Linear):
        stop = last.inputs[0]
        margins, rows = _last_layer(last.operator, run(graph, x, stop=stop), y)
        lengths = rows.double().norm(dim=2)
    else:
        logits = run(graph, x)
        margins = _margins(margin_rows(y, logits.shape[1], logits.dtype), logits)
        lengths = torch.full_like(margins, math.sqrt(2), dtype=torch.float64)
    constant = _grown(graph, torch.ones((), dtype=torch.float64, device=x.device), gains, stop)
    # Equal rows make equal logits but for the bias: what is positive then stays so.
    return (margins.double() / (constant * lengths).clamp(min=1e-30)).amin(1)


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


def _last_layer(operator: Linear, centre: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The margins at the centre, (N, K−1), and the rows W_y − W_j, (N, K−1, h)."""
    logits = operator.forward(centre)
    rows = margin_rows(y, logits.shape[1], logits.dtype)
    return _margins(rows, logits), rows @ operator.weight


def _margins(rows: Tensor, logits: Tensor) -> Tensor:
    return torch.bmm(rows, logits[:, :, None])[:, :, 0]


def certified_gains(graph: Graph, like: Tensor) -> Gains:
    """Upper bounds of the operator norms, in float64."""
    return {number: _certified(graph, number, like) for number in _affine(graph)}


def estimated_gains(graph: Graph, like: Tensor, iterations: int = 10) -> Gains:
    """Power iteration: from below, differentiable in the weights; for training losses only."""
    return {number: _estimated(graph, number, like, iterations) for number in _affine(graph)}


def _affine(graph: Graph) -> list[int]:
    """The affine nodes, but for a dense last one, which is merged with the specification."""
    last = len(graph.nodes) - 1
    numbers = [n for n, node in enumerate(graph.nodes) if isinstance(node.operator, Affine)]
    return [n for n in numbers if n != last or not isinstance(graph.nodes[n].operator, Linear)]


@torch.no_grad()
def _certified(graph: Graph, number: int, like: Tensor) -> Tensor:
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
