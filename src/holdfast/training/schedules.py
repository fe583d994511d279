"""Learning-rate schedules: pure functions of the step, so that a resumed run needs no state.

A step t of T stands at the share t / T of the training; milestones are such shares.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from holdfast.component import Component

Share = Annotated[float, Field(ge=0, le=1)]


class Schedule(Component, family="schedules"):
    """The factor on the learning rate at each optimiser step."""

    warmup: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training over which the rate climbs linearly to the schedule's own."""
    after: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training before which the schedule stands at its start: decay only after a ramp of eps."""

    def factor(self, step: int, total_steps: int) -> float:
        """The factor at step 0 … total_steps − 1."""
        wait = self.after * total_steps
        climb = min((step + 1) / (self.warmup * total_steps), 1.0) if self.warmup else 1.0
        return climb * self.shape(max(step - wait, 0.0), total_steps - wait)

    @abstractmethod
    def shape(self, step: float, total_steps: float) -> float:
        """The factor without warm-up, counted from where the schedule starts."""

    def momentum(self, step: int, total_steps: int) -> float | None:
        """The momentum at a step; None leaves the optimiser's own."""
        return None


class Constant(Schedule, name="constant"):
    """The same learning rate throughout."""

    def shape(self, step: float, total_steps: float) -> float:
        return 1.0


class Step(Schedule, name="step"):
    """Multiplied by ``gamma`` again and again."""

    every: float = Field(default=0.25, gt=0, le=1)
    """Share of the training between two falls."""
    gamma: PositiveFloat = 0.1
    """What the factor is multiplied by."""

    def shape(self, step: float, total_steps: float) -> float:
        return self.gamma ** math.floor(step / (self.every * total_steps) + 1e-9)


class MultiStep(Schedule, name="multi-step"):
    """Multiplied by ``gamma`` at each milestone."""

    milestones: list[Share] = [0.5, 0.75]
    """Shares of the training at which the factor falls."""
    gamma: PositiveFloat = 0.1
    """What it is multiplied by."""

    def shape(self, step: float, total_steps: float) -> float:
        return self.gamma ** sum(_reached(share, step, total_steps) for share in self.milestones)


class Piecewise(MultiStep, name="piecewise"):
    """A tenth from a quarter of the training on, a hundredth from three eighths on (neural-collapse line)."""

    milestones: list[Share] = [0.25, 0.375]
    """Shares of the training at which the factor falls."""


class OneDrop(Schedule, name="one-drop"):
    """Full rate until one drop."""

    at: Share = 0.25
    """Share of the training at which the rate drops."""
    to: PositiveFloat = 0.1
    """Factor afterwards."""

    def shape(self, step: float, total_steps: float) -> float:
        return self.to if _reached(self.at, step, total_steps) else 1.0


class MultipleDecay(Schedule, name="multiple-decay"):
    """Down in equal steps: 1, 1 − 1/n, …, 1/n."""

    steps: PositiveInt = 10
    """How many steps."""

    def shape(self, step: float, total_steps: float) -> float:
        return 1.0 - math.floor(self.steps * step / total_steps + 1e-9) / self.steps


class Linear(Schedule, name="linear"):
    """Flat, then linearly to ``middle``, then linearly to ``end``, each on a part of the training."""

    flat: Share = 1 / 3
    """Share of the training with the full rate."""
    bend: Share = 2 / 3
    """Share at which the factor is ``middle``."""
    middle: PositiveFloat = 0.1
    """Factor at the bend."""
    end: PositiveFloat = 0.01
    """Factor at the end."""

    def shape(self, step: float, total_steps: float) -> float:
        knots = [0.0, self.flat, self.bend, 1.0]
        return _interpolate(step / total_steps, knots, [1.0, 1.0, self.middle, self.end])


class Superconvergent(Schedule, name="superconvergent"):
    """Linearly up from 0 to the full rate and down to 0."""

    peak: Share = 0.4
    """Share of the training at which the rate is full."""

    def shape(self, step: float, total_steps: float) -> float:
        return _interpolate(step / total_steps, [0.0, self.peak, 1.0], [0.0, 1.0, 0.0])


class Cosine(Schedule, name="cosine"):
    """Along half a cosine from 1 to 0."""

    def shape(self, step: float, total_steps: float) -> float:
        return _cosine(1.0, 0.0, step / total_steps)


class OneCycle(Schedule, name="one-cycle"):
    """Up from ``start`` to 1 and down to ``end``, along cosines (Smith & Topin, 2019).

    The same values as ``torch.optim.lr_scheduler.OneCycleLR``. That cycles the momentum against the rate
    unless told not to; here it is left alone unless ``momentum_range`` is given.
    """

    peak: float = Field(default=0.3, gt=0, lt=1)
    """Share of the training at which the factor is 1."""
    start: PositiveFloat = 1 / 25
    """Factor at the first step."""
    end: PositiveFloat = 4e-6
    """Factor at the last step."""
    momentum_range: tuple[Share, Share] | None = None
    """Momentum at the peak and at both ends, such as [0.85, 0.95]; the optimiser's own throughout by default."""

    def shape(self, step: float, total_steps: float) -> float:
        return self._cycle(step, total_steps, self.start, 1.0, self.end)

    def momentum(self, step: int, total_steps: int) -> float | None:
        if self.momentum_range is None:
            return None
        low, high = self.momentum_range
        return self._cycle(step, total_steps, high, low, high)

    def _cycle(self, step: float, total_steps: float, start: float, middle: float, end: float) -> float:
        top, last = self.peak * total_steps - 1, total_steps - 1
        if step <= top:
            return _cosine(start, middle, step / top if top > 0 else 1.0)
        return _cosine(middle, end, (step - top) / max(last - top, 1e-12))


def _reached(share: float, step: float, total_steps: float) -> bool:
    """Whether a step has come to a share of the training; 0.55 · 100 is more than 55 in floating point."""
    return step >= share * total_steps - 1e-9 * total_steps


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def _interpolate(position: float, knots: list[float], values: list[float]) -> float:
    """The value at a position of the line through knots and values."""
    for left, right, start, end in zip(knots, knots[1:], values, values[1:], strict=False):
        if position < right:
            return start + (end - start) * (position - left) / (right - left)
    return values[-1]
