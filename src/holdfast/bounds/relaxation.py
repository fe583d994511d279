"""Lines below and above the operators that are not affine: what a backward pass replaces them with.

A relaxation of an operator holds on the interval of its input. ``pull`` takes coefficients a of the
operator's result and gives coefficients of its input and an offset, such that the new function is nowhere above
⟨a, result⟩ on that interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from typing import Literal, Protocol

import torch
from torch import Tensor

from holdfast.bounds.interval import Interval, kernel_error, rule
from holdfast.bounds.operators import (
    Elementwise,
    MaxPool,
    Monotone,
    Operator,
    PairwiseMax,
    Rectifier,
    UnsupportedOperator,
)
from holdfast.bounds.rounding import STEPS, Cost, dots
from holdfast.inference import mix_seed

SlopeRule = Literal["adaptive", "same-slope", "zero", "one", "random"]
"""Slope of the line below an unstable ReLU: 1 where u > −l and else 0; u / (u − l); 0; 1; 0 or 1 by lot."""

GRID = 64
"""Pieces of the interval on which a smooth function is evaluated."""


class Relaxation(Protocol):
    """Bounding functions for each of N examples."""

    @property
    def cost(self) -> Cost | None:
        """What rounding may make of them and of a pull; None where the interval does not account for it."""

    def pull(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients (N, S, *input) and offset (N, S) from coefficients (N, S, *result)."""

    def take(self, rows: Tensor) -> Relaxation:
        """Those of some examples."""


@dataclass(frozen=True)
class Lines:
    """slope · v + offset below and above, entry by entry, (N, ...)."""

    lower_slope: Tensor
    """Where each function has lines of its own, slopes and offsets are (N, S, ...)."""
    upper_slope: Tensor
    lower_offset: Tensor | None
    """None where the lower lines pass through the origin."""
    upper_offset: Tensor
    cost: Cost | None = None

    def pull(self, a: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper = (t if t.dim() == a.dim() else t[:, None] for t in (self.lower_slope, self.upper_slope))
        above = a.clamp(max=0)
        offset = _each_dot(above, self.upper_offset)
        if self.lower_offset is not None:
            offset = offset + _each_dot(a.clamp(min=0), self.lower_offset)
        # Fewer passes over the coefficients than above · upper + below · lower; exact where the two lines are one.
        return torch.addcmul(a * lower, above, upper - lower), offset

    def take(self, rows: Tensor) -> Lines:
        return Lines(
            self.lower_slope[rows],
            self.upper_slope[rows],
            None if self.lower_offset is None else self.lower_offset[rows],
            self.upper_offset[rows],
            self.cost and self.cost.take(rows),
        )


def _each_dot(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ for (N, S, ...) and (N, ...) or (N, S, ...), (N, S)."""
    return (a * b).flatten(2).sum(2) if b.dim() == a.dim() else dots(a, b)


@dataclass(frozen=True)
class Constants:
    """Every monotone function lies between its values at the ends of the interval."""

    value: Interval
    shape: torch.Size

    @property
    def cost(self) -> Cost | None:
        return pull_cost(self.value, self.value.size)

    def pull(self, a: Tensor) -> tuple[Tensor, Tensor]:
        centre, radius = self.value.centre.flatten(1)[:, None], self.value.radius.flatten(1)[:, None]
        offset = (a.flatten(2) * centre - a.flatten(2).abs() * radius).sum(2)
        return a.new_zeros(*a.shape[:2], *self.shape), offset

    def take(self, rows: Tensor) -> Constants:
        return Constants(self.value.take(rows), self.shape)


@dataclass(frozen=True)
class Winners:
    """A maximum over windows: at least the entry of largest lower bound; exactly that where no other can
    exceed it, and at most the largest upper bound."""

    index: Tensor
    """Of the entry within its flat channel, (N, C, windows)."""
    alone: Tensor
    """Whether no other entry can exceed it, (N, C, windows)."""
    largest: Tensor
    """Upper bound of the maximum, (N, C, windows)."""
    shape: torch.Size
    cost: Cost | None = None

    def pull(self, a: Tensor) -> tuple[Tensor, Tensor]:
        a = a.flatten(3)
        constant = (a < 0) & ~self.alone[:, None]
        offset = torch.where(constant, a * self.largest[:, None], 0).sum((2, 3))
        spread = torch.where(constant, 0, a)
        pulled = a.new_zeros(*a.shape[:3], self.shape[1:].numel())
        pulled = pulled.scatter_add(3, self.index[:, None].expand_as(spread), spread)
        return pulled.view(*a.shape[:2], *self.shape), offset

    def take(self, rows: Tensor) -> Winners:
        cost = self.cost and self.cost.take(rows)
        return Winners(self.index[rows], self.alone[rows], self.largest[rows], self.shape, cost)


@dataclass(frozen=True)
class SortedPairs:
    """max(a, b) = b + relu(a − b) and min(a, b) = a − relu(a − b), with lines for the ReLU."""

    lines: Lines
    cost: Cost | None = None

    def pull(self, a: Tensor) -> tuple[Tensor, Tensor]:
        of_max, of_min = a[:, :, ::2], a[:, :, 1::2]
        of_difference, offset = self.lines.pull(of_max - of_min)
        pulled = torch.stack([of_min + of_difference, of_max - of_difference], 3)
        return pulled.flatten(2, 3), offset

    def take(self, rows: Tensor) -> SortedPairs:
        return SortedPairs(self.lines.take(rows), self.cost and self.cost.take(rows))


def pull_cost(value: Interval, size: Tensor, error: Tensor | float = 0.0) -> Cost | None:
    """Of a pull whose terms, one for each entry of the result, are of this size, (N, ...).

    Args:
        value: the interval that the relaxation holds on.
        error: by how much the relaxation may fail to hold, entry by entry.
    """
    if (rounding := value.rounding) is None:
        return None
    with torch.no_grad():
        entries = math.prod(size.shape[1:])
        share = rounding.gamma(entries + STEPS) * size + error + rounding.tiny
        return Cost(share.flatten(1), rounding.tiny * entries * (1 + value.size.flatten(1).sum(1)))


@singledispatch
def relax(operator: Operator, value: Interval, slopes: Slopes) -> Relaxation:
    """The relaxation of an operator that is not affine on an interval of its input; a new kind registers here."""
    raise UnsupportedOperator(f"{type(operator).__name__} has no linear relaxation; the method ibp may do")


Slopes = Callable[[Interval], Tensor]
"""Where the slope of the lower line lies between the least and the largest possible, in [0, 1]: (N, [S,] ...)."""


@relax.register
def _(operator: Rectifier, value: Interval, slopes: Slopes) -> Relaxation:
    return rectifier_lines(value, slopes, operator.leak)


def rectifier_lines(value: Interval, slopes: Slopes, leak: float = 0.0) -> Lines:
    """Above an unstable entry the chord, below a line through the origin; a stable entry is itself."""
    lower, upper = value.lower.clamp(max=0), value.upper.clamp(min=0)
    share = upper / torch.where(upper > lower, upper - lower, 1)
    chord = leak + (1 - leak) * share if leak else share
    active, unstable = value.lower >= 0, (value.lower < 0) & (value.upper > 0)
    below = slopes(value)
    if below.dim() > chord.dim():
        active, unstable = active[:, None], unstable[:, None]
    slope = torch.where(unstable, leak + (1 - leak) * below, torch.where(active, 1.0, leak).to(below))
    offset = (leak - chord) * lower
    # The chord and what lies below it are made by a few roundings of numbers no larger than the ends.
    error = 0.0 if value.rounding is None else value.rounding.gamma(2 * STEPS) * value.size
    return Lines(slope, chord, None, offset, pull_cost(value, offset, error))


@relax.register
def _(operator: Elementwise, value: Interval, slopes: Slopes) -> Relaxation:
    """Two parallels of the chord, shifted until they hold.

    On a piece of length h between neighbouring points f − slope · v is within curvature · h² / 8 of its chord, so
    that its extremes are at most so far beyond those at the points.
    """
    lower, upper = value.lower, value.upper
    ends = operator.function(lower), operator.function(upper)
    width = upper - lower
    wide = width > 1e-6 * (1 + lower.abs())
    slope = torch.where(wide, (ends[1] - ends[0]) / torch.where(wide, width, 1), 0)
    slope = slope.clamp(-operator.steepest, operator.steepest)  # narrow intervals round it farther
    pieces = GRID if operator.curvature else 1
    steps = torch.linspace(0, 1, pieces + 1, dtype=lower.dtype, device=lower.device)
    least = most = ends[0] - slope * lower
    points = [lower + width * step for step in steps[1:-1]] + [upper]
    points += [torch.minimum(torch.maximum(torch.full_like(lower, kink), lower), upper) for kink in operator.kinks]
    for point in points:
        gap = operator.function(point) - slope * point
        least, most = torch.minimum(least, gap), torch.maximum(most, gap)
    stray = 0.0 if value.rounding is None else value.rounding.gamma(4) * value.size  # of the points between
    margin = operator.curvature * (width / pieces + stray).square() / 8
    margin = torch.where(wide, margin, operator.steepest * width)
    least, most = least - margin, most + margin
    return Lines(slope, slope, least, most, _parallels_cost(operator, value, ends, least, most, margin))


def _parallels_cost(
    operator: Elementwise, value: Interval, ends: tuple[Tensor, Tensor], least: Tensor, most: Tensor, margin: Tensor
) -> Cost | None:
    if (rounding := value.rounding) is None:
        return None
    size = torch.maximum(ends[0].abs(), ends[1].abs()) + 2 * operator.steepest * value.size
    error = kernel_error(operator, value, size) + rounding.gamma(2 * STEPS) * (size + margin)
    return pull_cost(value, torch.maximum(least.abs(), most.abs()), error)


@relax.register
def _(operator: Monotone, value: Interval, slopes: Slopes) -> Relaxation:
    return Constants(rule(operator, value), value.centre.shape[1:])


@relax.register
def _(operator: PairwiseMax, value: Interval, slopes: Slopes) -> Relaxation:
    lower, upper = value.lower, value.upper
    if lower.shape[1] % 2:
        raise UnsupportedOperator("MaxMin of an odd number of channels has no linear relaxation; ibp and bcp do")
    low, high = lower[:, ::2] - upper[:, 1::2], upper[:, ::2] - lower[:, 1::2]
    if (rounding := value.rounding) is None:
        return SortedPairs(rectifier_lines(Interval.between(low, high), adaptive))
    lines = rectifier_lines(Interval.between(rounding.below(low), rounding.above(high), rounding), adaptive)
    assert lines.cost is not None
    sums = rounding.gamma(STEPS) * (value.size[:, ::2] + value.size[:, 1::2])
    share = (lines.cost.share.view_as(sums) + sums).repeat_interleave(2, 1).flatten(1)
    return SortedPairs(lines, Cost(share, 2 * lines.cost.floor))


@relax.register
def _(operator: MaxPool, value: Interval, slopes: Slopes) -> Relaxation:
    lower, upper = value.lower, value.upper
    _, index = operator.where(lower)
    largest, _ = operator.where(upper)
    flat = index.flatten(2)
    best = lower.flatten(2).gather(2, flat)
    if operator.overlap == 1:  # the winners out of the way, does another entry of the window reach above them?
        rivals = upper.flatten(2).scatter(2, flat, -torch.inf).view_as(upper)
        strongest = operator.where(rivals)[0].flatten(2)
    else:
        strongest = largest.flatten(2)
    largest = largest.flatten(2)
    cost = pull_cost(value, largest.abs() + value.size.flatten(2).gather(2, flat))
    return Winners(flat, strongest <= best, largest, value.centre.shape[1:], cost)


def adaptive(value: Interval) -> Tensor:
    """1 where the ReLU is active on the larger part of the interval, else 0."""
    return (value.upper > -value.lower).to(value.centre)


def slopes_by(name: SlopeRule, seed: int = 0) -> Callable[[int], Slopes]:
    """The rule of each node, by its number."""

    def same(value: Interval) -> Tensor:
        width = (value.upper - value.lower).clamp(min=torch.finfo(value.centre.dtype).tiny)
        return (value.upper.clamp(min=0) / width).clamp(max=1)

    def by_lot(node: int) -> Slopes:
        def draw(value: Interval) -> Tensor:
            generator = torch.Generator().manual_seed(mix_seed(seed, node))
            coins = torch.randint(0, 2, value.centre.shape[1:], generator=generator)
            return coins.to(value.centre).expand_as(value.centre)

        return draw

    rules: dict[str, Slopes] = {
        "adaptive": adaptive,
        "same-slope": same,
        "zero": lambda value: torch.zeros_like(value.centre),
        "one": lambda value: torch.ones_like(value.centre),
    }
    return by_lot if name == "random" else lambda _: rules[name]
