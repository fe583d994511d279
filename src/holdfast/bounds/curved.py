"""Functions of single entries that are convex or concave by pieces, and the lines that touch them.

On an interval a line below such a function either touches it in a convex piece or is a chord; so does a line above
it in a concave one. Where it touches is chosen to be best at the middle of the interval, or optimised
(``Bent.lines``). Whatever the slope is, the offset is the least that f(v) − slope · v can be: on a concave or
straight piece it is taken at the ends, and on a convex one it is no less than that of any tangent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from holdfast.bounds.interval import Interval, rule
from holdfast.bounds.operators import Elementwise, Map, Operator, OutsideDomain, apply
from holdfast.bounds.relaxation import Lines, Slopes, pull_cost, relax
from holdfast.bounds.rounding import KERNEL, STEPS, Cost, Rounding

BISECTIONS = 20
"""Halvings of a piece that look for the tangent through a point; how near they come is no matter of soundness."""

Unary = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Bends:
    """Where a function of one variable is convex and where concave."""

    derivative: Map
    """f'; at a kink that of the piece beside it that is bent, where there is one."""
    breaks: tuple[float, ...]
    """Points of inflection and kinks, ascending."""
    pieces: tuple[int, ...]
    """Before, between and behind them: 1 where f is convex, −1 where concave, 0 where straight."""


@dataclass(frozen=True)
class Curved(Elementwise):
    """A function f of each entry, of bounded slope, that is convex or concave by pieces: sigmoid, GELU."""

    bends: Bends = field(kw_only=True)


@dataclass(frozen=True)
class Steep(Operator):
    """A function f of each entry whose slope has no bound, or which is not defined everywhere: exp, log, square."""

    function: Map
    bends: Bends
    name: str
    """Of the function, for messages."""
    turns: tuple[float, ...] = ()
    """Where f passes from falling to rising or back."""
    least: float = -math.inf
    """f is nowhere below."""
    start: float = -math.inf
    """f is defined from here on."""
    hole: float | None = None
    """Where f has no finite value."""

    def check(self, value: Interval) -> None:
        """Refuse an interval on which f is not defined everywhere; a point gives what f gives there."""
        outside = value.lower < self.start
        if self.hole is not None:
            outside = outside | ((value.lower <= self.hole) & (value.upper >= self.hole))
        outside = outside & ~(value.radius == 0)  # also where it is NaN, of an infinite end
        if outside.any():
            low, high = (float(end.detach()[outside][0]) for end in (value.lower, value.upper))
            raise OutsideDomain(
                f"{self.name} is not defined on all of [{low:.6g}, {high:.6g}], where its input may lie; a smaller "
                "eps, a tighter method or a constant added to its input may help"
            )


@apply.register
def _(operator: Steep, value: Tensor) -> Tensor:
    return operator.function(value)


@rule.register
def _(operator: Steep, value: Interval) -> Interval:
    operator.check(value)
    points = value.lower, *(_between(turn, value) for turn in operator.turns), value.upper
    every = torch.stack([operator.function(point) for point in points])
    lower, upper = every.amin(0), every.amax(0)
    if (rounding := value.rounding) is not None:
        share = rounding.gamma(KERNEL)
        lower = (lower - share * lower.abs() - rounding.tiny).clamp(min=operator.least)
        upper = upper + share * upper.abs() + rounding.tiny
    return Interval.between(lower, upper, rounding)


def _between(point: float, value: Interval) -> Tensor:
    """The point of each interval nearest to this one."""
    return torch.minimum(torch.maximum(torch.full_like(value.lower, point), value.lower), value.upper)


@dataclass(frozen=True)
class Touch:
    """Lines on one side of a function: where they may touch it, entry by entry, (N, ...)."""

    low: Tensor
    high: Tensor
    start: Tensor
    """Where between them the line is best at the middle of the interval, in [0, 1]."""
    tangent: Tensor
    """Whether the line is a tangent; else it is the chord."""
    piece: Tensor
    """The number of the piece that it touches."""

    def map(self, function: Unary) -> Touch:
        """The same function of each."""
        return Touch(*(function(t) for t in vars(self).values()))

    def where(self, mask: Tensor, other: Touch) -> Touch:
        """This, and the other where the mask is not set."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Touch(*(torch.where(mask, mine, theirs) for mine, theirs in pairs))


@dataclass(frozen=True)
class Bent:
    """A function on intervals (N, ...): points there, and the lines that may touch it."""

    operator: Curved | Steep
    points: tuple[Tensor, ...]
    """Both ends, with the breaks between them."""
    values: tuple[Tensor, ...]
    slopes: tuple[Tensor, ...]
    chord: Tensor
    """Slope from end to end."""
    below: Touch
    above: Touch
    cost: Cost | None

    @property
    def starts(self) -> Tensor:
        """Where the lines below and above touch unless told otherwise, (N, 2, ...), from 0 to 1."""
        return torch.stack([self.below.start, self.above.start], 1)

    def take(self, rows: Tensor) -> Bent:
        """Those of some examples."""
        taken = self._map(lambda t: t[rows])
        return replace(taken, cost=self.cost and self.cost.take(rows))

    def lines(self, places: Tensor | None = None) -> Lines:
        """The lines below and above.

        Args:
            places: where they touch, (N, S, 2, ...) from 0 to 1 for S functions; the best at the middle by default.
        """
        if places is None:
            below, above = self._line(1, self.below.start), self._line(-1, self.above.start)
        else:
            each = self._map(lambda t: t[:, None])
            below, above = each._line(1, places[:, :, 0]), each._line(-1, places[:, :, 1])
        return Lines(below[0], above[0], below[1], above[1], self.cost)

    def _map(self, function: Unary) -> Bent:
        points, values, slopes = (
            tuple(function(t) for t in each) for each in (self.points, self.values, self.slopes)
        )
        return Bent(
            self.operator,
            points,
            values,
            slopes,
            function(self.chord),
            self.below.map(function),
            self.above.map(function),
            self.cost,
        )

    def _line(self, sign: int, place: Tensor) -> tuple[Tensor, Tensor]:
        """Slope and offset of the lines below (sign 1) or above (−1)."""
        touch = self.below if sign > 0 else self.above
        at = touch.low + place * (touch.high - touch.low)
        at = torch.minimum(torch.maximum(at, touch.low), touch.high)  # a rounding beyond may be another piece
        slope = torch.where(touch.tangent, self.operator.bends.derivative(at), self.chord)
        gap = sign * (self.operator.function(at) - slope * at)
        return slope, sign * self._least(sign, slope, touch, gap)

    def _least(self, sign: int, slope: Tensor, touch: Touch | None = None, gap: Tensor | None = None) -> Tensor:
        """At most sign · (f(v) − slope · v) on the interval.

        Args:
            gap: of the tangent of this slope, if there is one.
        """
        least: Tensor | None = None
        gaps = [sign * (f - slope * v) for f, v in zip(self.values, self.points, strict=True)]
        for each in gaps:
            least = each if least is None else torch.minimum(least, each)
        assert least is not None
        for k, bend in enumerate(self.operator.bends.pieces):
            if bend * sign <= 0:
                continue
            width = self.points[k + 1] - self.points[k]
            tilts = (
                (sign * (self.slopes[k] - slope)).clamp(max=0),
                (sign * (slope - self.slopes[k + 1])).clamp(max=0),
            )
            ends = (
                torch.where(tilt.isfinite(), each + tilt * width, -torch.inf)
                for tilt, each in zip(tilts, gaps[k : k + 2], strict=True)
            )
            best = torch.maximum(*ends)
            if touch is not None and gap is not None:
                best = torch.where(touch.tangent & (touch.piece == k), torch.maximum(best, gap), best)
            least = torch.minimum(least, best)
        return least


def bent(operator: Curved | Steep, value: Interval) -> Bent:
    """The function on an interval of its input."""
    if isinstance(operator, Steep):
        operator.check(value)
    points = (value.lower, *(_between(point, value) for point in operator.bends.breaks), value.upper)
    values = tuple(operator.function(point) for point in points)
    slopes = tuple(operator.bends.derivative(point) for point in points)
    width = points[-1] - points[0]
    wide = width > 1e-6 * (1 + points[0].abs())
    chord = torch.where(wide, (values[-1] - values[0]) / torch.where(wide, width, 1), slopes[0])
    every = torch.stack(slopes)
    chord = torch.minimum(torch.maximum(chord, every.amin(0)), every.amax(0))  # narrow intervals round it farther
    chord = chord.masked_fill(chord.isinf(), 0)
    middle, zero = (points[0] + points[-1]) / 2, torch.zeros_like(chord)
    nothing = Touch(middle, middle, zero, torch.zeros_like(chord, dtype=torch.bool), zero)
    found = Bent(operator, points, values, slopes, chord, nothing, nothing, None)
    with torch.no_grad():
        found = replace(found, below=_touch(found, 1), above=_touch(found, -1))
        return replace(found, cost=None if value.rounding is None else _bent_cost(found, value, value.rounding))


def _touch(bent: Bent, sign: int) -> Touch:
    """Where lines on one side touch best at the middle of the interval."""
    points, (derivative, pieces) = bent.points, (bent.operator.bends.derivative, bent.operator.bends.pieces)
    middle = (points[0] + points[-1]) / 2
    best = bent._least(sign, bent.chord) + sign * bent.chord * middle
    touch = bent.below  # none
    for k, bend in enumerate(pieces):
        if bend * sign < 0:
            continue
        left, right = points[k], points[k + 1]
        if isinstance(bent.operator, Steep):  # near its ends the function may be as steep as it can
            left, right = left + (right - left) / 128, right - (right - left) / 128
        if bend:
            low, first = _nearest(bent, sign, left, right, range(k))
            high, last = _nearest(bent, sign, right, left, range(k + 1, len(points)))
            fits = first & last & (low <= high)
        else:
            low = high = (left + right) / 2
            fits = _is_beyond(bent, sign, low, [j for j in range(len(points)) if j not in (k, k + 1)])
        at = torch.minimum(torch.maximum(middle, low), high)
        slope = derivative(at)
        there = sign * (bent.operator.function(at) + slope * (middle - at))
        better = fits & (there > best)
        start = ((at - low) / torch.where(high > low, high - low, 1)).clamp(0, 1)
        mine = Touch(low, high, start, better, torch.full_like(low, k))
        touch = Touch(
            *(
                torch.where(better, new, old)
                for new, old in zip(vars(mine).values(), vars(touch).values(), strict=True)
            )
        )
        best = torch.where(better, there, best)
    return touch


def _is_beyond(bent: Bent, sign: int, at: Tensor, others: range | list[int]) -> Tensor:
    """Whether the tangent at a point is on its side of the function at others, up to rounding."""
    value, slope = bent.operator.function(at), bent.operator.bends.derivative(at)
    beyond = torch.ones_like(at, dtype=torch.bool)
    unit = 16 * torch.finfo(at.dtype).eps
    for j in others:
        rise = slope * (bent.points[j] - at)
        slack = unit * (value.abs() + rise.abs() + bent.values[j].abs())
        beyond &= sign * (value + rise - bent.values[j]) <= slack
    return beyond


def _nearest(bent: Bent, sign: int, want: Tensor, other: Tensor, others: range) -> tuple[Tensor, Tensor]:
    """The point nearest to the wanted end of a piece whose tangent is on its side of these points, and whether
    there is one: they see it, if at all, from the other end on."""
    if not others:
        return want, torch.ones_like(want, dtype=torch.bool)
    test = partial(_is_beyond, bent, sign, others=others)
    at_once, there = test(want), test(other)
    bad, good = want, torch.where(at_once, want, other)
    for _ in range(BISECTIONS):
        middle = (bad + good) / 2
        fits = test(middle)
        good, bad = torch.where(fits, middle, good), torch.where(fits, bad, middle)
    return torch.where(at_once, want, good), at_once | there


def _bent_cost(bent: Bent, value: Interval, rounding: Rounding) -> Cost | None:
    """The kernels of f and f' err by a few roundings, the latter on the way along the interval, and so do the
    gaps."""
    touches = [(side.tangent, at) for side in (bent.below, bent.above) for at in (side.low, side.high)]
    derivative = bent.operator.bends.derivative
    slopes = [torch.where(tangent, derivative(at), 0).abs() for tangent, at in touches]
    steepest = torch.stack([bent.chord.abs(), *slopes]).amax(0)
    if isinstance(bent.operator, Curved):
        steepest = torch.full_like(steepest, bent.operator.steepest)
    size = torch.stack([f.abs() for f in bent.values]).amax(0) + 2 * steepest * value.size
    read = steepest * (1 + value.size) if isinstance(bent.operator, Curved) else 0
    error = rounding.gamma(KERNEL) * (size + read) + rounding.gamma(2 * STEPS) * size + rounding.tiny
    error = error + rounding.gamma(2 * KERNEL) * steepest * (bent.points[-1] - bent.points[0])
    return pull_cost(value, size, error)


@relax.register(Curved)
@relax.register(Steep)
def _(operator: Curved | Steep, value: Interval, slopes: Slopes) -> Lines:
    return bent(operator, value).lines()
