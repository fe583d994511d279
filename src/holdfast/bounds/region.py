"""What the input may be: the threat set of each example, or a box given entry by entry."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from holdfast.bounds.interval import Interval
from holdfast.threat import Threat


class Region(Protocol):
    """A convex set of inputs for each of N examples."""

    @property
    def box(self) -> Interval:
        """The smallest box around it, (N, ...)."""

    def minimum(self, coefficients: Tensor) -> Tensor:
        """The least ⟨a, x'⟩ for x' in the set, for each of the S functions (N, S, ...) of each example; (N, S)."""

    def take(self, rows: Tensor) -> Region:
        """The sets of some examples."""


@dataclass(frozen=True)
class Box:
    """All inputs within an interval: exact for l_inf, and for any box given entry by entry."""

    box: Interval

    def minimum(self, coefficients: Tensor) -> Tensor:
        a = coefficients.flatten(2)
        centre, radius = self.box.centre.flatten(1)[:, :, None], self.box.radius.flatten(1)[:, :, None]
        return (torch.bmm(a, centre) - torch.bmm(a.abs(), radius))[:, :, 0]

    def take(self, rows: Tensor) -> Box:
        return Box(self.box.take(rows))


@dataclass(frozen=True)
class Ball:
    """All inputs in the threat's ball and box around x, (N, ...), of radius eps, (N,)."""

    x: Tensor
    threat: Threat
    eps: Tensor

    @property
    def box(self) -> Interval:
        return Interval.between(*self.threat.interval(self.x, self.eps))

    def minimum(self, coefficients: Tensor) -> Tensor:
        a = coefficients.flatten(2)
        functions = a.shape[1]
        x = self.x.flatten(1)
        each = x.repeat_interleave(functions, 0)
        reach = self.threat.support(each, -a.flatten(0, 1), self.eps.repeat_interleave(functions))
        return torch.bmm(a, x[:, :, None])[:, :, 0] - reach.view(-1, functions)

    def take(self, rows: Tensor) -> Ball:
        return Ball(self.x[rows], self.threat, self.eps[rows])


def region_of(x: Tensor, threat: Threat, eps: Tensor | None = None) -> Region:
    """The threat set of each input.

    Args:
        eps: another radius for each example, (N,); the threat's own by default.
    """
    if threat.order == 0 and not (math.isfinite(threat.low) and math.isfinite(threat.high)):
        raise ValueError(f"an l0 ball without a finite box is unbounded, given {threat}")
    if threat.is_box:
        return Box(Interval.between(*threat.interval(x, eps)))
    return Ball(x, threat, torch.full_like(x.flatten(1)[:, 0], threat.eps) if eps is None else eps)
