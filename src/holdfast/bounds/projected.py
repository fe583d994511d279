"""Estimates of the convex outer polytope's widths by random projections (Wong et al., 2018): for training only.

With the slopes u / (u − l) above and below, a network is affine in its inputs and one variable of [−1, 1] for each
unstable ReLU, so that the width of a value is the l_1 norm of its row of coefficients. Products of the rows with
Cauchy variables are pushed forward in place of the rows; their median size over many draws estimates that norm.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from holdfast.bounds.interval import Interval
from holdfast.bounds.operators import (
    Affine,
    Concatenate,
    Graph,
    Operator,
    Rectifier,
    Sum,
    UnsupportedOperator,
    walk,
)
from holdfast.bounds.region import Ball, Region
from holdfast.draws import Draws
from holdfast.search import per_example


class _Sketch:
    """A value: its centre (N, ...), and K products of its coefficients with random variables, (K, N, ...)."""

    def __init__(self, centre: Tensor, straight: Tensor, normal: Tensor | None) -> None:
        self.centre, self.straight, self.normal = centre, straight, normal
        """``straight`` with Cauchy variables; with normal ones what comes of an input ball in l_2."""

    @property
    def interval(self) -> Interval:
        radius = self.straight.abs().median(0).values
        if self.normal is not None:
            radius = radius + self.normal.square().mean(0).sqrt()
        return Interval(self.centre, radius)

    def mapped(self, operator: Affine) -> _Sketch:
        shape = tuple(self.centre.shape[1:])
        bias = operator.bias(self.centre, shape)

        def linear(products: Tensor) -> Tensor:
            return (operator.forward(products.flatten(0, 1)) - bias).unflatten(0, products.shape[:2])

        normal = None if self.normal is None else linear(self.normal)
        return _Sketch(operator.forward(self.centre), linear(self.straight), normal)


def projected_intervals(graph: Graph, region: Region, projections: int, draws: Draws) -> dict[int, Interval]:
    """Estimated intervals of all values but the last, differentiable; those of the inputs and of what is affine in
    the inputs of a ball in l_2 have no or little error, all others one of a share of about 2 / √projections.

    Args:
        region: a box, or a ball in l_2 (l_1 is refused).
        projections: K.
        draws: one stream, for all examples alike.

    Raises:
        UnsupportedOperator: another operator than affine ones, ReLU, sums and concatenations.
    """
    stream = _Cauchy(draws, projections)
    box, ball = region.box, isinstance(region, Ball)
    if isinstance(region, Ball) and region.threat.order != 2:
        raise UnsupportedOperator("random projections are for boxes and balls in l_2")
    still = box.centre.new_zeros(projections, *box.centre.shape)
    if isinstance(region, Ball):
        length = per_example(region.eps, region.x)
        first = _Sketch(region.x, still, length * stream.normal(region.x))
    else:
        first = _Sketch(box.centre, box.radius * stream.cauchy(box.centre), None)
    found = {0: box if ball else first.interval}

    def step(number: int, operator: Operator, *values: _Sketch) -> _Sketch:
        value = _image(operator, values, stream)
        found[number + 1] = value.interval
        return value

    walk(graph, {0: first}, step, range(len(graph.nodes) - 1))
    return found


def _image(operator: Operator, values: tuple[_Sketch, ...], stream: _Cauchy) -> _Sketch:
    first = values[0]
    if isinstance(operator, Affine):
        return first.mapped(operator)
    if isinstance(operator, Rectifier) and operator.leak == 0:
        inside = first.interval
        lower, upper = inside.lower.clamp(max=0), inside.upper.clamp(min=0)
        slope = upper / (upper - lower).clamp(min=torch.finfo(lower.dtype).tiny)
        half = -slope * lower / 2  # 0 of what is stable
        normal = None if first.normal is None else slope * first.normal
        noise = half * stream.cauchy(half)
        return _Sketch(slope * first.centre + half, slope * first.straight + noise, normal)
    if isinstance(operator, Sum):
        second = values[1]
        normal = (
            None if first.normal is None or second.normal is None else first.normal + operator.sign * second.normal
        )
        straight = first.straight + operator.sign * second.straight
        return _Sketch(first.centre + operator.sign * second.centre, straight, normal)
    if isinstance(operator, Concatenate):
        dim = operator.dim
        normals = [value.normal for value in values if value.normal is not None]
        return _Sketch(
            torch.cat([value.centre for value in values], dim),
            torch.cat([value.straight for value in values], dim + 1 if dim >= 0 else dim),
            torch.cat(normals, dim + 1 if dim >= 0 else dim) if normals else None,
        )
    raise UnsupportedOperator(
        f"random projections are for affine layers and ReLU, not for {type(operator).__name__}"
    )


class _Cauchy:
    """Random variables for values of one shape after another."""

    def __init__(self, draws: Draws, projections: int) -> None:
        self.draws, self.projections, self.used = draws, projections, 0

    def _next(self, like: Tensor, *, normal: bool) -> Tensor:
        count = self.projections * math.prod(like.shape[1:])
        if normal:
            found = self.draws.normal(count, at=self.used)
        else:
            found = (math.pi * (self.draws.uniform(count, at=self.used) + 2.0**-25 - 0.5)).tan()
        self.used += count + count % 2
        return found.to(like).view(self.projections, 1, *like.shape[1:])

    def cauchy(self, like: Tensor) -> Tensor:
        """(K, 1, ...)."""
        return self._next(like, normal=False)

    def normal(self, like: Tensor) -> Tensor:
        """(K, 1, ...)."""
        return self._next(like, normal=True)
