"""What the input may be: the threat set of each example, or a box given entry by entry."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from holdfast.bounds.interval import Interval
from holdfast.bounds.rounding import STEPS, Bound, Rounding, dots
from holdfast.threat import Threat


class Region(Protocol):
    """A convex set of inputs for each of N examples."""

    @property
    def box(self) -> Interval:
        """The smallest box around it, (N, ...)."""

    @property
    def rounding(self) -> Rounding | None:
        """What bounds on it account for."""

    def minimum(self, coefficients: Tensor) -> Bound:
        """The least ⟨a, x'⟩ for x' in the set, for each of the S functions (N, S, ...) of each example; (N, S).

        The slack is yet to be taken from it.
        """

    def take(self, rows: Tensor) -> Region:
        """The sets of some examples."""

    def plain(self) -> Region:
        """The same set, for bounds that do not account for rounding."""


@dataclass(frozen=True)
class Box:
    """All inputs within an interval: exact for l_inf, and for any box given entry by entry."""

    box: Interval

    @property
    def rounding(self) -> Rounding | None:
        return self.box.rounding

    def minimum(self, coefficients: Tensor) -> Bound:
        a = coefficients.flatten(2)
        lower = dots(a, self.box.centre) - dots(a.abs(), self.box.radius)
        return Bound(lower, product_error(a, self.box.size, self.rounding))

    def take(self, rows: Tensor) -> Box:
        return Box(self.box.take(rows))

    def plain(self) -> Box:
        return Box(Interval(self.box.centre, self.box.radius))


@dataclass(frozen=True)
class Ball:
    """All inputs in the threat's ball and box around x, (N, ...), of radius eps, (N,)."""

    x: Tensor
    threat: Threat
    eps: Tensor
    around: Interval
    """The smallest box around it, (N, ...)."""

    @property
    def box(self) -> Interval:
        return self.around

    @property
    def rounding(self) -> Rounding | None:
        return self.around.rounding

    def minimum(self, coefficients: Tensor) -> Bound:
        a = coefficients.flatten(2)
        functions, rounding = a.shape[1], self.rounding
        each, eps = self.x.flatten(1).repeat_interleave(functions, 0), self.eps.repeat_interleave(functions)
        down = -a.flatten(0, 1)
        if rounding is None:
            reach = self.threat.support(each, down, eps).view(-1, functions)
            return Bound(dots(a, self.x) - reach)
        above, below = self.around.upper - self.x, self.x - self.around.lower
        up, low = (
            rounding.up(room.clamp(min=0)).flatten(1).repeat_interleave(functions, 0) for room in (above, below)
        )
        reach = self.threat.support(each, down, eps, torch.where(down > 0, up, low)).view(-1, functions)
        # The support is made of sums of sizes, none of which exceeds it by more than four times.
        error = 4 * rounding.gamma(a.shape[2] + STEPS) * reach.detach()
        slack = product_error(a, self.x.abs(), rounding)
        assert slack is not None
        return Bound(dots(a, self.x) - reach, slack + error)

    def take(self, rows: Tensor) -> Ball:
        return Ball(self.x[rows], self.threat, self.eps[rows], self.around.take(rows))

    def plain(self) -> Ball:
        return Ball(self.x, self.threat, self.eps, Interval(self.around.centre, self.around.radius))


def product_error(a: Tensor, size: Tensor, rounding: Rounding | None) -> Tensor | None:
    """What the products ⟨a, v⟩ of (N, S, d) with vectors of this size (N, ...) may err by, (N, S)."""
    if rounding is None:
        return None
    entries = a.shape[2]
    floor = rounding.tiny * entries * (1 + size.flatten(1).sum(1))
    return rounding.gamma(2 * entries + STEPS) * dots(a.detach().abs(), size) + floor[:, None]


def region_of(x: Tensor, threat: Threat, eps: Tensor | None = None, rounding: Rounding | None = None) -> Region:
    """The threat set of each input.

    Args:
        eps: another radius for each example, (N,), float64 where it is meant to be exact; the threat's own by
            default.
        rounding: what bounds on the set account for; the set is then rounded outward itself.
    """
    if threat.order == 0 and not (math.isfinite(threat.low) and math.isfinite(threat.high)):
        raise ValueError(f"an l0 ball without a finite box is unbounded, given {threat}")
    radius = torch.full_like(x.flatten(1)[:, 0], threat.eps, dtype=torch.float64) if eps is None else eps
    if rounding is None:
        radius = radius.to(x.dtype)
        box = Interval.between(*threat.interval(x, radius))
    else:
        box = Interval.between(*_outward(x, threat, radius.double()), rounding)
        radius = rounded(radius.double(), x.dtype, math.inf)
    return Box(box) if threat.is_box else Ball(x, threat, radius, box)


def _outward(x: Tensor, threat: Threat, eps: Tensor) -> tuple[Tensor, Tensor]:
    """The ends of the threat's box around each input, rounded outward."""
    ends = []
    for end, towards in zip(threat.interval(x.double(), eps), (-math.inf, math.inf), strict=True):
        beyond = torch.nextafter(end, torch.full_like(end, towards)).clamp(threat.low, threat.high)
        ends.append(rounded(beyond, x.dtype, towards))
    return ends[0], ends[1]


def rounded(value: Tensor, dtype: torch.dtype, towards: float) -> Tensor:
    """A float64 number in another type, rounded up or down."""
    near = value.to(dtype)
    short = near.double() < value if towards > 0 else near.double() > value
    return torch.where(short, torch.nextafter(near, torch.full_like(near, towards)), near)
