"""Division of an example's entries by their root mean square: what LayerNorm and RMSNorm do beside affine maps.

y_i = c_i · r with r = (mean c² + ε)^(−½). By itself y_i rises with c_i, and goes towards 0 as the other squares
grow, so that its interval is exact. Its planes are those of the product, with planes for r on the way: below by the
tangent of s^(−½) and chords of the squares, above by its chord and tangents of the squares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.bounds.calls import Argument, Call, Steps
from holdfast.bounds.interval import Interval, rule
from holdfast.bounds.operators import Affine, Operator, UnsupportedOperator, apply
from holdfast.bounds.relaxation import Slopes, pull_cost, relax
from holdfast.bounds.rounding import KERNEL, Cost


@dataclass(frozen=True)
class RootMeanSquare(Operator):
    """c ↦ c / √(mean c² + ε) over the last dimensions."""

    dims: int
    eps: float

    def rows(self, t: Tensor) -> Tensor:
        """(..., R, n): the entries that are divided together last."""
        flat = t.flatten(-self.dims)
        return flat.flatten(1, -2) if flat.dim() > 2 else flat[:, None]


@apply.register
def _(operator: RootMeanSquare, value: Tensor) -> Tensor:
    dims = tuple(range(-operator.dims, 0))
    return value * (value.square().mean(dims, keepdim=True) + operator.eps).rsqrt()


@rule.register
def _(operator: RootMeanSquare, value: Interval) -> Interval:
    low, high = operator.rows(value.lower), operator.rows(value.upper)
    n, rounding = low.shape[-1], value.rounding
    share = rounding.gamma(2 * n + KERNEL) if rounding else 0.0
    least, most = _squares(low, high)
    fewest, all_ = (t.sum(-1, keepdim=True) for t in (least, most))
    fewest = (fewest - least - share * fewest).clamp(min=0)  # of the others
    all_ = all_ - most + share * all_

    def end(c: Tensor, others: Tensor) -> Tensor:
        size = (c.square() + others) / n + operator.eps
        return c * torch.where(size.isfinite(), size, torch.nan).rsqrt()  # what overflows is no bound

    lower, upper = end(low, torch.where(low >= 0, all_, fewest)), end(high, torch.where(high >= 0, fewest, all_))
    if rounding is not None:
        lower = lower - share * lower.abs() - rounding.tiny
        upper = upper + share * upper.abs() + rounding.tiny
    return Interval.between(lower.view_as(value.centre), upper.view_as(value.centre), rounding)


def _squares(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest square of a number between."""
    ends = low.square(), high.square()
    least = torch.where((low < 0) & (high > 0), 0, torch.minimum(*ends))
    return least, torch.maximum(*ends)


@dataclass(frozen=True)
class Side:
    """A plane on one side of r: ⟨slope, c⟩ + offset, and what it is made of in size."""

    slope: Tensor
    """(N, R, n)."""
    offset: Tensor
    """(N, R, 1)."""

    def take(self, rows: Tensor) -> Side:
        return Side(self.slope[rows], self.offset[rows])


@dataclass(frozen=True)
class Divided:
    """Planes of y_i = c_i r, or constants where those are better at the centre."""

    operator: RootMeanSquare
    value: Interval
    scale: Tensor
    """The middle of r, (N, R, 1)."""
    spread: Tensor
    """Half the width of r times that of c_i, (N, R, n)."""
    below: Side
    above: Side
    image: Interval
    constant: tuple[Tensor, Tensor]
    """Whether the constant is better, below and above, (N, R, n)."""
    cost: Cost | None = None

    def pull(self, a: Tensor) -> tuple[Tensor, Tensor]:
        rows = a.flatten(-self.operator.dims)
        rows = rows.flatten(2, -2) if rows.dim() > 3 else rows[:, :, None]  # (N, S, R, n)
        centre, low, high = (
            self.operator.rows(t)[:, None] for t in (self.value.centre, self.image.lower, self.image.upper)
        )
        below, above = self.constant[0][:, None], self.constant[1][:, None]
        fixed = (rows > 0) & below | (rows < 0) & above
        offset = torch.where(fixed, torch.where(rows > 0, rows * low, rows * high), 0).sum((2, 3))
        rows = torch.where(fixed, 0, rows)
        scale = self.scale[:, None]
        of_r = rows * centre
        rising = of_r.clamp(min=0).sum(-1, keepdim=True)
        falling = of_r.clamp(max=0).sum(-1, keepdim=True)
        pulled = rows * scale + rising * self.below.slope[:, None] + falling * self.above.slope[:, None]
        offset = offset - (of_r * scale + rows.abs() * self.spread[:, None]).sum((2, 3))
        offset = offset + (rising * self.below.offset[:, None] + falling * self.above.offset[:, None]).sum((2, 3))
        return pulled.view_as(a), offset

    def take(self, rows: Tensor) -> Divided:
        return Divided(
            self.operator,
            self.value.take(rows),
            self.scale[rows],
            self.spread[rows],
            self.below.take(rows),
            self.above.take(rows),
            self.image.take(rows),
            (self.constant[0][rows], self.constant[1][rows]),
            self.cost and self.cost.take(rows),
        )


@relax.register
def _(operator: RootMeanSquare, value: Interval, slopes: Slopes) -> Divided:
    low, high, centre, radius, size = (
        operator.rows(t) for t in (value.lower, value.upper, value.centre, value.radius, value.size)
    )
    n, rounding = low.shape[-1], value.rounding
    share = rounding.gamma(n + KERNEL) if rounding else 0.0
    least, most = _squares(low, high)
    fewest = least.mean(-1, keepdim=True) * (1 - share) + operator.eps
    all_ = most.mean(-1, keepdim=True) * (1 + share) + operator.eps
    largest, smallest = fewest.rsqrt() * (1 + share), all_.rsqrt() * (1 - share)
    # above: the chord of s^(−½), and s at least the tangents of the squares at the centre
    width = all_ - fewest
    fall = torch.where(width > 0, (smallest - largest) / torch.where(width > 0, width, 1), 0)
    above = Side(
        fall * 2 * centre / n, largest + fall * (operator.eps - centre.square().mean(-1, keepdim=True) - fewest)
    )
    # below: the tangent of s^(−½) at the s that the chords of the squares give at the centre
    at = (centre.square() + radius.square()).mean(-1, keepdim=True) + operator.eps
    tangent = -at.rsqrt() / at / 2
    chords = (low * high).mean(-1, keepdim=True)
    below = Side(tangent * (low + high) / n, at.rsqrt() + tangent * (operator.eps - chords - at))
    scale = (largest + smallest) / 2
    spread = (largest - smallest) / 2 * (1 + share) * radius
    image = rule(operator, value)
    middle = [(side.slope * centre).sum(-1, keepdim=True) + side.offset for side in (below, above)]
    lower = torch.where(centre >= 0, centre * middle[0], centre * middle[1]) - spread
    upper = torch.where(centre >= 0, centre * middle[1], centre * middle[0]) + spread
    constant = lower < operator.rows(image.lower), upper > operator.rows(image.upper)
    cost = None
    if rounding is not None:
        terms = 2 * size.square().mean(-1, keepdim=True) + operator.eps
        planes = 2 * (largest + at.rsqrt() + (fall.abs() + tangent.abs()) * (terms + at + fewest))
        sizes = (4 * size * (largest + planes)).view_as(value.centre)
        cost = pull_cost(value, sizes, rounding.gamma(2 * n + 4 * KERNEL) * sizes)
    return Divided(operator, value, scale, spread, below, above, image, constant, cost)


def centring(dims: int, shape: tuple[int, ...]) -> Affine:
    """x ↦ x − mean x over the last dimensions, of an example of this shape."""
    over, n = tuple(range(-dims, 0)), math.prod(shape[-dims:])

    def absolute(radius: Tensor) -> Tensor:  # |1 − 1/n| of each, and 1/n of the others
        return radius * (1 - 2 / n) + radius.mean(over, keepdim=True)

    return Affine(lambda x: x - x.mean(over, keepdim=True), absolute, summands=n + 2)


def scaling(weight: Tensor | None, bias: Tensor | None) -> Affine:
    """x ↦ weight · x + bias, which have the shape of the last dimensions."""

    def forward(x: Tensor) -> Tensor:
        x = x if weight is None else x * weight
        return x if bias is None else x + bias

    def absolute(radius: Tensor) -> Tensor:
        return radius if weight is None else radius * weight.abs()

    return Affine(forward, absolute, entrywise=True)


def layer_norm(call: Call) -> Operator:
    """The steps of ``torch.nn.functional.layer_norm``."""

    def rule(
        input: Argument,
        normalized_shape: tuple[int, ...],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        *rest: object,
    ) -> Operator:
        if isinstance(weight, Argument) or isinstance(bias, Argument):
            raise UnsupportedOperator("a layer norm whose weights depend on the input has no rule")
        dims = len(normalized_shape)
        steps = [centring(dims, tuple(input.value.shape[1:])), RootMeanSquare(dims, eps), scaling(weight, bias)]
        return Steps(tuple((step, (number,)) for number, step in enumerate(steps)))

    return rule(*call.args, **call.kwargs)


def rms_norm(call: Call) -> Operator:
    """The steps of ``torch.nn.functional.rms_norm``."""

    def rule(
        input: Argument, normalized_shape: tuple[int, ...], weight: Tensor | None = None, eps: float | None = None
    ) -> Operator:
        if eps is None and input.value.dtype == torch.float64:
            raise UnsupportedOperator(
                "eps=None is another number in float64 than in float32, which the network may be from; give eps"
            )
        floor = torch.finfo(input.value.dtype).eps if eps is None else eps
        steps = [RootMeanSquare(len(normalized_shape), floor), scaling(weight, None)]
        return Steps(tuple((step, (number,)) for number, step in enumerate(steps)))

    return rule(*call.args, **call.kwargs)
