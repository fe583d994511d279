"""Learning-rate schedules: pure functions of the step, so that a resumed run needs no state."""

from __future__ import annotations

import math
from abc import abstractmethod

from pydantic import Field, PositiveFloat

from holdfast.component import Component


class Schedule(Component, family="schedules"):
    """The factor on the learning rate at each optimiser step."""

    @abstractmethod
    def factor(self, step: int, total_steps: int) -> float:
        """The factor at step 0 … total_steps − 1."""


class Constant(Schedule, name="constant"):
    """The same learning rate throughout."""

    def factor(self, step: int, total_steps: int) -> float:
        return 1.0


class OneCycle(Schedule, name="one-cycle"):
    """Up from ``start`` to 1 and down to ``end``, along cosines (Smith & Topin, 2019).

    The same values as ``torch.optim.lr_scheduler.OneCycleLR``; momentum is left alone.
    """

    peak: float = Field(default=0.3, gt=0, lt=1)
    """Share of the training at which the factor is 1."""
    start: PositiveFloat = 1 / 25
    """Factor at the first step."""
    end: PositiveFloat = 4e-6
    """Factor at the last step."""

    def factor(self, step: int, total_steps: int) -> float:
        top, last = self.peak * total_steps - 1, total_steps - 1
        if step <= top:
            return _cosine(self.start, 1.0, step / top if top > 0 else 1.0)
        return _cosine(1.0, self.end, (step - top) / max(last - top, 1e-12))


class Step(Schedule, name="step"):
    """Multiplied by ``gamma`` at each milestone."""

    milestones: list[float] = [0.5, 0.75]
    """Shares of the training at which the factor falls."""
    gamma: PositiveFloat = 0.1
    """What it is multiplied by."""

    def factor(self, step: int, total_steps: int) -> float:
        return self.gamma ** sum(step >= share * total_steps for share in self.milestones)


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
