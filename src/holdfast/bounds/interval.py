"""The interval domain (IBP): every value lies in centre ± radius (Gowal et al., 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, singledispatch

import torch
from torch import Tensor

from holdfast.bounds.operators import Affine, Concatenate, Elementwise, LipschitzMap, Monotone, Operator, Sum


@dataclass(frozen=True)
class Interval:
    """All values within ``radius`` ≥ 0 of ``centre``, coordinate by coordinate; (N, ...) each."""

    centre: Tensor
    radius: Tensor

    @classmethod
    def between(cls, lower: Tensor, upper: Tensor) -> Interval:
        return cls((upper + lower) / 2, (upper - lower) / 2)

    @classmethod
    def point(cls, x: Tensor) -> Interval:
        return cls(x, torch.zeros_like(x))

    def take(self, rows: Tensor) -> Interval:
        """Those of some examples."""
        return Interval(self.centre[rows], self.radius[rows])

    def intersect(self, lower: Tensor, upper: Tensor) -> Interval:
        """What lies in both; a point between them, should rounding leave nothing. A NaN stays."""
        low, high = torch.maximum(self.lower, lower), torch.minimum(self.upper, upper)
        return Interval((high + low) / 2, ((high - low) / 2).clamp(min=0))

    @cached_property
    def lower(self) -> Tensor:
        return self.centre - self.radius

    @cached_property
    def upper(self) -> Tensor:
        return self.centre + self.radius


@singledispatch
def rule(operator: Operator, *values: Interval) -> Interval:
    """The interval of an operator's result, given those of its inputs; a new kind registers here."""
    raise TypeError(
        f"{type(operator).__name__} has no interval rule; holdfast.bounds.interval.rule.register adds one"
    )


@rule.register
def _(operator: Affine, value: Interval) -> Interval:
    return Interval(operator.forward(value.centre), operator.absolute(value.radius))


@rule.register
def _(operator: Monotone, value: Interval) -> Interval:
    return Interval.between(operator.function(value.lower), operator.function(value.upper))


@rule.register
def _(operator: Elementwise, value: Interval) -> Interval:
    ends = [operator.function(value.lower), operator.function(value.upper)]
    if not operator.turns:
        return Interval.between(*ends)
    for turn in operator.turns:
        inner = torch.minimum(torch.maximum(torch.full_like(value.centre, turn), value.lower), value.upper)
        ends.append(operator.function(inner))
    every = torch.stack(ends)
    return Interval.between(every.amin(0), every.amax(0))


@rule.register
def _(operator: LipschitzMap, value: Interval) -> Interval:
    """No entry moves farther than the whole does in l_2."""
    centre = operator.function(value.centre)
    reach = operator.constant * value.radius.flatten(1).norm(dim=1)
    return Interval(centre, reach.view(-1, *[1] * (centre.dim() - 1)).expand_as(centre))


@rule.register
def _(operator: Sum, first: Interval, second: Interval) -> Interval:
    return Interval(first.centre + operator.sign * second.centre, first.radius + second.radius)


@rule.register
def _(operator: Concatenate, *values: Interval) -> Interval:
    return Interval(
        torch.cat([value.centre for value in values], operator.dim),
        torch.cat([value.radius for value in values], operator.dim),
    )
