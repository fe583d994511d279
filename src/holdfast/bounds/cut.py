"""Boxes cut with balls in a training step: their ends, and the ReLU behind them, in few passes over memory.

What autograd makes of a maximum, a minimum and a mean takes some forty passes forth and back, where a mask and a
few sums do. Nothing here accounts for rounding.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from holdfast.bounds.interval import Interval


class Cut(Interval):
    """A box ∩ {v: |v − middle| ≤ reach}, coordinate by coordinate; a point between them, should rounding leave
    nothing. Computed where it is read."""

    def __init__(self, box: Interval, middle: Tensor, reach: Tensor) -> None:
        vars(self).update(box=box, middle=middle, reach=reach, rounding=None)

    @cached_property
    def _between(self) -> tuple[Tensor, Tensor]:
        return self._taken(False)

    @property
    def centre(self) -> Tensor:
        return self._between[0]

    @property
    def radius(self) -> Tensor:
        return self._between[1]

    def rectified(self) -> Interval:
        """The interval behind a ReLU."""
        return Interval(*self._taken(True))

    def _taken(self, rectifies: bool) -> tuple[Tensor, Tensor]:
        box: Interval = vars(self)["box"]
        values = box.centre, box.radius, vars(self)["middle"], vars(self)["reach"]
        found: tuple[Tensor, Tensor] = _Cut.apply(rectifies, *values)
        return found


class _Cut(torch.autograd.Function):
    """(centre, radius, middle, reach) ↦ centre and radius of the cut, or of what a ReLU makes of it."""

    @staticmethod
    def forward(
        ctx: Any, rectifies: bool, centre: Tensor, radius: Tensor, middle: Tensor, reach: Tensor
    ) -> tuple[Tensor, Tensor]:
        low, high = centre - radius, centre + radius
        other = middle - reach
        boxed_low = low - other  # > 0 where the box decides, and the ball does not
        low = torch.maximum(low, other, out=low)
        other = torch.add(middle, reach, out=other)
        boxed_high = other - high
        high = torch.minimum(high, other, out=high)
        positive = (low.relu_(), high.relu_()) if rectifies else ()
        ctx.save_for_backward(boxed_low, boxed_high, *positive)
        ctx.size = reach.shape
        half = torch.sub(high, low, out=other).mul_(0.5).clamp_(min=0)
        return (low + high).mul_(0.5), half

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_centre, of_radius = gradients
        boxed_low, boxed_high, *positive = ctx.saved_tensors
        low, high = (of_centre - of_radius).mul_(0.5), (of_centre + of_radius).mul_(0.5)
        if positive:
            low, high = _where_positive(low, positive[0]), _where_positive(high, positive[1])
        by_low, by_high = _where_positive(low, boxed_low), _where_positive(high, boxed_high)
        low, high = low.sub_(by_low), high.sub_(by_high)  # what the ball decides
        reach = (high - low).sum_to_size(ctx.size)
        return None, by_low + by_high, by_high.sub_(by_low), low.add_(high), reach


def _where_positive(gradient: Tensor, value: Tensor) -> Tensor:
    """The gradient of a ReLU of the value."""
    return torch.ops.aten.threshold_backward(gradient, value, 0)
