"""DeepFool: to the nearest linearised boundary, again and again."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from holdfast.attacks.attack import GradientAttack, MinimumNormAttack, Nearest, Targets, with_own
from holdfast.attacks.losses import asked
from holdfast.attacks.pgd import likeliest
from holdfast.search import per_example, slopes_of
from holdfast.threat import Threat


class DeepFool(MinimumNormAttack, GradientAttack, name="deepfool"):
    """The shortest step to the nearest linearised boundary z_j = z_y, repeated (Moosavi-Dezfooli et al., 2016).

    An example is done with its first wrong point, and moves no further.
    """

    steps: PositiveInt = 50
    """Steps at most; each takes a backward pass for every class that is looked at."""
    targets: PositiveInt = 9
    """Look at the boundaries to the so many likeliest other classes."""
    overshoot: NonNegativeFloat = 0.02
    """How far beyond the boundary to go, as a share of the way from the input."""
    folds: ClassVar[bool] = True

    @property
    def title(self) -> str:
        return f"DeepFool-{self.steps}"

    def minimise(self, model: nn.Module, targets: Targets, threat: Threat, nearest: Nearest) -> None:
        # What certificates exclude within eps may be the nearest beyond it.
        everything = targets._replace(open=with_own(targets.logits.isfinite(), targets.y))
        columns = [column for column in likeliest(everything, self.targets) if (column >= 0).any()]
        classes = torch.stack([torch.where(column < 0, columns[0], column) for column in columns], 1)
        # As published the step ignores the box, which cuts it; one along a single entry would get stuck so.
        way = threat if threat.sparse else replace(threat, low=-math.inf, high=math.inf)
        rows = torch.arange(len(targets.x), device=targets.x.device)
        bare = targets.x  # without the overshoot
        for step in range(self.steps + 1):
            x, y = targets.x[rows], targets.y[rows]
            points = x + (1 + self.overshoot) * (bare - x)
            points = points.clamp(threat.low, threat.high).requires_grad_(step < self.steps)
            with torch.enable_grad():
                gaps, wrong = asked(model, points, y, partial(_gaps, y, classes[rows]), self.samples)
            nearest.best.forwards[rows] += 1
            everyone = torch.zeros_like(nearest.best.finished)
            everyone[rows] = wrong
            whole = targets.x.index_copy(0, rows, points.detach())
            nearest.offer(whole, everyone, step)
            if step == self.steps or wrong.all():
                break
            shortest = torch.full_like(gaps.detach()[:, 0], torch.inf)
            chosen, gain = torch.zeros_like(x), torch.zeros_like(shortest)
            for number in range(gaps.shape[1]):
                gradient, odd = slopes_of(gaps[:, number], points, keep=number + 1 < gaps.shape[1])
                nearest.best.odd[rows] |= odd
                slope = threat.dual_length(gradient)
                # In units of the slope, so that the scale of the logits makes no difference.
                scale = torch.where(slope > 0, slope, 1)
                missing = -gaps.detach()[:, number] / scale
                nearer = (missing.abs() < shortest) & (slope > 0)
                shortest = torch.where(nearer, missing.abs(), shortest)
                gain = torch.where(nearer, missing, gain)
                chosen = torch.where(per_example(nearer, x), gradient / per_example(scale, x), chosen)
            nearest.best.backwards[rows] += gaps.shape[1]
            step_to = way.shortest_step(points.detach(), chosen, gain + 1e-4 * gain.abs() + 1e-6)
            bare, rows = (bare + step_to).clamp(threat.low, threat.high)[~wrong], rows[~wrong]


def _gaps(y: Tensor, classes: Tensor, logits: Tensor) -> Tensor:
    """z_j − z_y for these classes j of each example, (n, number of classes)."""
    return logits.gather(1, classes) - logits.gather(1, y[:, None])
