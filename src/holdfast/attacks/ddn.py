"""DDN: decoupled direction and norm."""

from __future__ import annotations

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import nn

from holdfast.attacks.attack import GradientAttack, MinimumNormAttack, Nearest, Targets
from holdfast.attacks.fmn import along, cosine
from holdfast.attacks.losses import asked, cross_entropy
from holdfast.search import per_example, slopes_of
from holdfast.threat import Threat


class DDN(MinimumNormAttack, GradientAttack, name="ddn"):
    """Steps along the gradient of the cross-entropy, at a length that follows the boundary (Rony et al., 2019).

    The l_2 length of the perturbation is 1 − γ times the last one where the point is adversarial and 1 + γ
    times where it is not. Steps fall from 1 to 0.01 along a cosine. Distances are in the threat's norm; the
    search is made for l_2.
    """

    steps: PositiveInt = 100
    """Gradient steps."""
    gamma: float = Field(default=0.05, gt=0, lt=1)
    """Relative change of the length in every step."""
    first: PositiveFloat = 1.0
    """Length of the first perturbation, in input units."""

    @property
    def title(self) -> str:
        return f"DDN-{self.steps}"

    def minimise(self, model: nn.Module, targets: Targets, threat: Threat, nearest: Nearest) -> None:
        x, y = targets.x, targets.y
        delta = torch.zeros_like(x)
        length = torch.full_like(nearest.distance, self.first)
        for step in range(self.steps + 1):
            points = (x + delta).clamp(threat.low, threat.high).requires_grad_(step < self.steps)
            with torch.enable_grad():
                loss, wrong = asked(model, points, y, lambda logits: cross_entropy(logits, y), self.samples)
            nearest.offer(points, wrong, step)
            nearest.count(1, int(step < self.steps))
            if step == self.steps:
                break
            gradient, odd = slopes_of(loss, points)
            nearest.best.odd.logical_or_(odd)
            delta = points.detach() - x + along(gradient, cosine(1.0, 0.01, step, self.steps))
            length = length * torch.where(wrong, 1 - self.gamma, 1 + self.gamma)
            delta = delta * per_example(length / delta.flatten(1).norm(dim=1).clamp(min=1e-12), x)
