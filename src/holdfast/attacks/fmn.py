"""FMN: fast minimum-norm attack."""

from __future__ import annotations

import math

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from holdfast.attacks.attack import GradientAttack, MinimumNormAttack, Nearest, Targets
from holdfast.attacks.losses import asked, gap
from holdfast.search import slopes_of
from holdfast.threat import Threat


def cosine(first: float, last: float, step: int, steps: int) -> float:
    """From ``first`` to ``last`` along half a cosine."""
    return last + (first - last) * (1 + math.cos(math.pi * step / steps)) / 2


def along(gradient: Tensor, length: float) -> Tensor:
    """Of this l_2 length, however small the gradient is; zero where it is zero. (N, ...)"""
    flat = gradient.flatten(1)
    _, exponent = flat.abs().amax(1, keepdim=True).frexp()
    flat = flat.ldexp(-exponent.clamp(-100, 100))  # exact; the squares of what is left neither vanish nor overflow
    norm = flat.norm(dim=1, keepdim=True)
    return (length * flat / torch.where(norm > 0, norm, 1)).view_as(gradient)


class FMN(MinimumNormAttack, GradientAttack, name="fmn"):
    """Ascent of the margin in a ball whose radius follows the boundary (Pintor et al., 2021); l_inf, l_2, l_1, l_0.

    The radius shrinks by γ where the point is adversarial and grows by γ where it is not; before the first
    success it is set to γ beyond where the linearised boundary lies (to the boundary itself in the paper, which
    on a linear model is never crossed). γ and the step fall along a cosine.
    """

    steps: PositiveInt = 100
    """Gradient steps."""
    step_size: PositiveFloat = 1.0
    """l_2 length of the first step, in input units; the last is a hundredth of it."""
    gamma: float = Field(default=0.05, gt=0, lt=1)
    """Relative change of the radius in the first step."""
    gamma_last: float = Field(default=0.001, gt=0, lt=1)
    """And in the last."""

    @property
    def title(self) -> str:
        return f"FMN-{self.steps}"

    def minimise(self, model: nn.Module, targets: Targets, threat: Threat, nearest: Nearest) -> None:
        x, y = targets.x, targets.y
        counting = threat.norm == "l0"
        points = x
        radius = torch.full_like(nearest.distance, 1.0 if counting else 0.0)
        for step in range(self.steps + 1):
            points = points.detach().requires_grad_(step < self.steps)
            with torch.enable_grad():
                gain, wrong = asked(model, points, y, lambda logits: gap(logits, y), self.samples)
            found = torch.isfinite(nearest.distance)
            distance = nearest.offer(points, wrong, step)
            nearest.count(1, int(step < self.steps))
            if step == self.steps:
                break
            gradient, odd = slopes_of(gain, points)
            nearest.best.odd.logical_or_(odd)
            gamma = cosine(self.gamma, self.gamma_last, step, self.steps)
            if counting:
                smaller = torch.minimum(torch.minimum(radius - 1, (radius * (1 - gamma)).floor()), nearest.distance)
                larger = torch.maximum(radius + 1, (radius * (1 + gamma)).floor())
                radius = torch.where(wrong, smaller, larger).clamp(min=0)
            else:
                slope = threat.dual_length(gradient)
                ahead = distance + gain.detach().abs() / slope.clamp(min=torch.finfo(slope.dtype).tiny)
                smaller = torch.minimum(radius * (1 - gamma), nearest.distance)
                radius = torch.where(
                    wrong, smaller, torch.where(found, radius, torch.maximum(radius, ahead)) * (1 + gamma)
                )
            alpha = cosine(self.step_size, self.step_size / 100, step, self.steps)
            points = threat.project(x, points.detach() + along(gradient, alpha), radius)
