"""Products of two activations, entry by entry and of matrices; quotients by them.

Both factors stand one behind the other in a single value, so that a product is an operator of one input as others
are. With x within r of c and y within s of d, x y lies within r s of c y + d x − c d: the mean of McCormick's two
planes below (or above), each of which is as good at the centre.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.bounds.calls import Steps
from holdfast.bounds.interval import Interval, rule
from holdfast.bounds.kinds import RECIPROCAL
from holdfast.bounds.operators import Concatenate, Operator, Shape, UnsupportedOperator, apply, moved
from holdfast.bounds.relaxation import Slopes, pull_cost, relax
from holdfast.bounds.rounding import STEPS, Cost


@dataclass(frozen=True)
class Product(Operator):
    """(x, y), flat and side by side, ↦ x · y with broadcasting, or x @ y."""

    left: Shape
    """Of x, of one example."""
    right: Shape
    matrices: bool = False

    def of(self, x: Tensor, y: Tensor) -> Tensor:
        """x · y or x @ y for (..., *left) and (..., *right)."""
        return x @ y if self.matrices else x * y

    def factors(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """x and y, (N, ...) each."""
        x, y = value.split([math.prod(self.left), math.prod(self.right)], 1)
        return x.view(-1, *self.left), y.view(-1, *self.right)

    @property
    def summands(self) -> int:
        """So many products are summed for an entry."""
        return self.left[-1] if self.matrices else 1


def joined(operator: Product, first: int = 0, second: int = 1, before: int = 2) -> Steps:
    """The steps of a product.

    Args:
        first: the number of what is x, second: of what is y, as in ``Steps``.
        before: so many numbers are taken.
    """
    flat = moved(lambda x: x.flatten(1))
    return Steps(
        ((flat, (first,)), (flat, (second,)), (Concatenate(1), (before, before + 1)), (operator, (before + 2,)))
    )


def product_of(first: Tensor, second: Tensor, matrices: bool = False) -> Steps:
    """The product of two activations (N, ...)."""
    if first.dim() != second.dim() or (matrices and first.dim() < 3):
        raise UnsupportedOperator(
            f"a product of activations of {first.dim()} and {second.dim()} dimensions has no rule, only of as many"
        )
    return joined(Product(tuple(first.shape[1:]), tuple(second.shape[1:]), matrices))


def quotient_of(first: Tensor, second: Tensor) -> Steps:
    """x / y as x · (1 / y)."""
    product = product_of(first, second)
    (last,) = (operator for operator, _ in product.steps if isinstance(operator, Product))
    return Steps(((RECIPROCAL, (1,)), *joined(last, 0, 2, 3).steps))


@apply.register
def _(operator: Product, value: Tensor) -> Tensor:
    return operator.of(*operator.factors(value))


@rule.register
def _(operator: Product, value: Interval) -> Interval:
    """Between the products of ends, exactly; of matrices the sums of those over what is summed."""
    (low, below), (high, above) = operator.factors(value.lower), operator.factors(value.upper)
    if operator.matrices:
        parts = [
            _corners(low[..., :, k, None], high[..., :, k, None], below[..., None, k, :], above[..., None, k, :])
            for k in range(operator.summands)
        ]
        lower, upper = parts[0]
        for part in parts[1:]:
            lower, upper = lower + part[0], upper + part[1]
    else:
        lower, upper = _corners(low, high, below, above)
    if (rounding := value.rounding) is not None:
        slack = (
            rounding.gamma(operator.summands + STEPS) * _size(operator, value) + operator.summands * rounding.tiny
        )
        lower, upper = lower - slack, upper + slack
    return Interval.between(lower, upper, rounding)


def _corners(low: Tensor, high: Tensor, below: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest product of a number in [low, high] with one in [below, above]."""
    first, second, third, fourth = low * below, low * above, high * below, high * above
    return (
        torch.minimum(torch.minimum(first, second), torch.minimum(third, fourth)),
        torch.maximum(torch.maximum(first, second), torch.maximum(third, fourth)),
    )


def _size(operator: Product, value: Interval) -> Tensor:
    return operator.of(*operator.factors(value.size))


@dataclass(frozen=True)
class Planes:
    """c y + d x − c d ± r s, as this module says."""

    operator: Product
    centre: Tensor
    """c and d, (N, entries)."""
    reach: Tensor
    """r s, (N, ...)."""
    cost: Cost | None = None

    def pull(self, a: Tensor) -> tuple[Tensor, Tensor]:
        operator, (c, d) = self.operator, self.operator.factors(self.centre)
        constant = a.flatten(2) * operator.of(c, d).flatten(1)[:, None]
        offset = -(constant + a.flatten(2).abs() * self.reach.flatten(1)[:, None]).sum(2)
        c, d = c[:, None], d[:, None]
        of_x, of_y = (a @ d.mT, c.mT @ a) if operator.matrices else (a * d, a * c)
        parts = _summed_to(of_x, operator.left), _summed_to(of_y, operator.right)
        return torch.cat([part.flatten(2) for part in parts], 2), offset

    def take(self, rows: Tensor) -> Planes:
        return Planes(self.operator, self.centre[rows], self.reach[rows], self.cost and self.cost.take(rows))


def _summed_to(t: Tensor, shape: Shape) -> Tensor:
    """(N, S, ...) summed over where a factor of this shape was broadcast."""
    dims = [d for d, (wide, n) in enumerate(zip(t.shape[2:], shape, strict=True), 2) if n == 1 < wide]
    return t.sum(dims, keepdim=True) if dims else t


@relax.register
def _(operator: Product, value: Interval, slopes: Slopes) -> Planes:
    reach = operator.of(*operator.factors(value.radius))
    cost = None
    if value.rounding is not None:
        size = 4 * _size(operator, value)
        cost = pull_cost(value, size, value.rounding.gamma(2 * operator.summands + 2 * STEPS) * size)
    return Planes(operator, value.centre, reach, cost)
