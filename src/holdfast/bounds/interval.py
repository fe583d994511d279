"""The interval domain (IBP): every value lies in centre ± radius (Gowal et al., 2018)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, singledispatch

import torch
from torch import Tensor

from holdfast.bounds.operators import (
    Affine,
    Concatenate,
    Elementwise,
    LipschitzMap,
    Monotone,
    Operator,
    Rectifier,
    Sum,
    UnsupportedOperator,
    lengths,
)
from holdfast.bounds.rounding import KERNEL, STEPS, Rounding
from holdfast.search import per_example


@dataclass(frozen=True)
class Interval:
    """All values within ``radius`` ≥ 0 of ``centre``, coordinate by coordinate; (N, ...) each."""

    centre: Tensor
    radius: Tensor
    rounding: Rounding | None = None
    """What is accounted for, by widening; in training nothing is."""

    @classmethod
    def between(cls, lower: Tensor, upper: Tensor, rounding: Rounding | None = None) -> Interval:
        centre = (upper + lower) / 2
        if rounding is None:
            return cls(centre, (upper - lower) / 2)
        radius = torch.maximum(upper - centre, centre - lower) * (1 + rounding.gamma(4))
        return cls(centre, radius, rounding)._with_ends(lower, upper)

    @classmethod
    def point(cls, x: Tensor, rounding: Rounding | None = None) -> Interval:
        return cls(x, torch.zeros_like(x), rounding)

    @classmethod
    def joined(cls, parts: Sequence[Interval]) -> Interval:
        """Those of several examples, in order."""
        names = ("centre", "radius") if parts[0].rounding is None else ("centre", "radius", "lower", "upper")
        centre, radius, *ends = (torch.cat([getattr(part, name) for part in parts]) for name in names)
        joined = cls(centre, radius, parts[0].rounding)
        return joined._with_ends(*ends) if ends else joined

    def take(self, rows: Tensor) -> Interval:
        """Those of some examples."""
        taken = Interval(self.centre[rows], self.radius[rows], self.rounding)
        return taken if self.rounding is None else taken._with_ends(self.lower[rows], self.upper[rows])

    def intersect(self, lower: Tensor, upper: Tensor) -> Interval:
        """What lies in both; a point between them, should rounding leave nothing. A NaN stays."""
        low, high = torch.maximum(self.lower, lower), torch.minimum(self.upper, upper)
        if self.rounding is not None:
            return Interval.between(low, high, self.rounding)
        return Interval((high + low) / 2, ((high - low) / 2).clamp(min=0))

    def _with_ends(self, lower: Tensor, upper: Tensor) -> Interval:
        """The same, its ends known better than centre and radius tell."""
        vars(self).update(lower=lower, upper=upper)
        return self

    @cached_property
    def lower(self) -> Tensor:
        lower = self.centre - self.radius
        return lower if self.rounding is None else self.rounding.below(lower)

    @cached_property
    def upper(self) -> Tensor:
        upper = self.centre + self.radius
        return upper if self.rounding is None else self.rounding.above(upper)

    @cached_property
    def size(self) -> Tensor:
        """The largest absolute value of each coordinate, up to a rounding, (N, ...)."""
        return self.centre.abs() + self.radius


@singledispatch
def rule(operator: Operator, *values: Interval) -> Interval:
    """The interval of an operator's result, given those of its inputs; a new kind registers here.

    Where the inputs have a ``rounding``, the result is widened by what computing it may err by, and has it too.
    """
    raise TypeError(
        f"{type(operator).__name__} has no interval rule; holdfast.bounds.interval.rule.register adds one"
    )


def image(operator: Operator, *values: Interval) -> Interval:
    """``rule``, which must have accounted for rounding where its inputs do."""
    result = rule(operator, *values)
    if values[0].rounding is not None and result.rounding is None:
        raise UnsupportedOperator(
            f"the interval rule of {type(operator).__name__} does not account for rounding: it should widen its "
            "result by what computing it may err by, and give it the rounding of its input"
        )
    return result


@rule.register
def _(operator: Affine, value: Interval) -> Interval:
    centre = operator.forward(value.centre)
    if (rounding := value.rounding) is None:
        return Interval(centre, operator.absolute(value.radius))
    if operator.moves:
        return Interval(centre, operator.absolute(value.radius), rounding)
    # W x errs by a share of |W| |centre| + |b|, and |W| r by one of itself.
    shape = tuple(value.centre.shape[1:])
    fan = operator.fan_in(shape)
    share = rounding.gamma(fan + STEPS)
    constants = 2 * share * operator.bias_size(value.centre, shape) + fan * rounding.tiny
    radius = operator.absolute(torch.add(value.radius, value.centre.abs(), alpha=share))
    return Interval(centre, torch.add(constants, radius, alpha=1 + 3 * share), rounding)


def between_values(operator: Monotone | Elementwise, value: Interval, lower: Tensor, upper: Tensor) -> Interval:
    """The interval between two values that the kernel of a function gave on this one."""
    if value.rounding is not None and operator.rounds:
        error = kernel_error(operator, value, torch.maximum(lower.abs(), upper.abs()))
        lower, upper = lower - error, upper + error
    return Interval.between(lower, upper, value.rounding)


def kernel_error(operator: Monotone | Elementwise, value: Interval, size: Tensor) -> Tensor:
    """What the kernel of a function may err by on an interval where its values are of this size.

    A function of single entries may lose a few roundings of its value and, like x Φ(x) in its tail, of its input;
    one of many entries may sum them all up.
    """
    rounding = value.rounding
    assert rounding is not None
    if not isinstance(operator, Elementwise):
        total = per_example(value.size.flatten(1).sum(1), size)
        return rounding.gamma(KERNEL + math.prod(value.centre.shape[1:])) * (size + total) + rounding.tiny
    read = operator.steepest * (1 + value.size) if operator.curvature else 0
    return rounding.gamma(KERNEL) * (size + read) + rounding.tiny


@rule.register
def _(operator: Monotone, value: Interval) -> Interval:
    lower, upper = operator.function(value.lower), operator.function(value.upper)
    return between_values(operator, value, lower, upper)


@rule.register
def _(operator: Elementwise, value: Interval) -> Interval:
    ends = [operator.function(value.lower), operator.function(value.upper)]
    for turn in operator.turns:
        inner = torch.minimum(torch.maximum(torch.full_like(value.centre, turn), value.lower), value.upper)
        ends.append(operator.function(inner))
    if len(ends) > 2:
        every = torch.stack(ends)
        ends = [every.amin(0), every.amax(0)]
    return between_values(operator, value, *ends)


@rule.register
def _(operator: Rectifier, value: Interval) -> Interval:
    """Of a ReLU the ends lie above 0, where widening them is a product, and the wider end is no smaller than the
    centre: the same interval in two thirds of the operations."""
    if (rounding := value.rounding) is None or operator.leak:
        return rule.dispatch(Elementwise)(operator, value)
    share = rounding.gamma(4)
    lower = torch.relu(value.centre - value.radius) * (1 - share)
    upper = torch.relu(value.centre + value.radius) * (1 + share)
    centre = (upper + lower) / 2
    return Interval(centre, torch.add(upper - centre, upper, alpha=share), rounding)._with_ends(lower, upper)


@rule.register
def _(operator: LipschitzMap, value: Interval) -> Interval:
    """No entry moves farther than the whole does in l_2."""
    centre = operator.function(value.centre)
    reach = operator.constant * lengths(value.radius.flatten(1))
    if (rounding := value.rounding) is not None:
        reach = rounding.up(reach, math.prod(value.radius.shape[1:])) + map_error(operator, value.size, rounding)
    return Interval(centre, per_example(reach, centre).expand_as(centre), rounding)


def map_error(operator: LipschitzMap, size: Tensor, rounding: Rounding) -> Tensor:
    """What computing such a function of values of this size, (N, ...), may err by in l_2, (N,)."""
    at_zero = lengths(operator.function(torch.zeros_like(size[:1])).flatten(1))
    length = operator.constant * lengths(size.flatten(1)) + at_zero
    return rounding.gamma(operator.roundings) * length + math.prod(size.shape[1:]) * rounding.tiny


@rule.register
def _(operator: Sum, first: Interval, second: Interval) -> Interval:
    centre, radius = first.centre + operator.sign * second.centre, first.radius + second.radius
    if (rounding := first.rounding) is not None:
        radius = rounding.up(radius) + rounding.gamma(2) * centre.abs()
    return Interval(centre, radius, rounding)


@rule.register
def _(operator: Concatenate, *values: Interval) -> Interval:
    return Interval(
        torch.cat([value.centre for value in values], operator.dim),
        torch.cat([value.radius for value in values], operator.dim),
        values[0].rounding,
    )
