"""σ-zero: the fewest changed entries, by a smooth count of them."""

from __future__ import annotations

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from holdfast.attacks.attack import GradientAttack, MinimumNormAttack, Nearest, Targets
from holdfast.attacks.fmn import cosine
from holdfast.attacks.losses import asked, gap
from holdfast.search import Ascent, per_example, slopes_of
from holdfast.threat import Threat


class SigmaZero(MinimumNormAttack, GradientAttack, name="sigma-zero"):
    """Descent of max(z_y − max_{j≠y} z_j, 0) + mean δ² / (δ² + σ), small entries of δ set to 0 (Cinà et al., 2024).

    For l_0, which counts entries: a pixel of three channels is three. The gradient over its largest entry goes
    into Adam, as in the authors' code; its step falls to a tenth along a cosine. The size below which an entry
    is set to 0 rises where the point is adversarial and falls where it is not, by ``pace`` times the step.
    """

    steps: PositiveInt = 1000
    """Gradient steps."""
    step_size: PositiveFloat = 1.0
    """Length of the first step along each entry, in input units; the last is a tenth of it."""
    sigma: PositiveFloat = 1e-3
    """σ: an entry of size √σ counts half."""
    threshold: float = Field(default=0.3, ge=0, le=1)
    """Size below which an entry is set to 0 in the first step, in input units."""
    pace: NonNegativeFloat = 0.01
    """Change of that size in every step, as a share of the step."""

    @property
    def title(self) -> str:
        return f"σ-zero-{self.steps}"

    def perturb(self, model: nn.Module, targets: Targets, threat: Threat) -> Ascent:
        if not threat.discrete:
            raise ValueError(
                f"sigma-zero counts changed entries and has no form for {threat.norm}; attack it with fmn"
            )
        return super().perturb(model, targets, threat)

    def minimise(self, model: nn.Module, targets: Targets, threat: Threat, nearest: Nearest) -> None:
        x, y = targets.x, targets.y
        points = x.clone().requires_grad_(True)
        adam = torch.optim.Adam([points], lr=self.step_size)
        threshold = torch.full_like(nearest.distance, self.threshold)
        for step in range(self.steps + 1):
            with torch.enable_grad():
                margin, wrong = asked(model, points, y, lambda logits: (-gap(logits, y)).clamp(min=0), self.samples)
                cost = margin + smooth_count(points - x, self.sigma) / x[0].numel()
            nearest.offer(points, wrong, step)
            nearest.count(1, int(step < self.steps))
            if step == self.steps:
                break
            gradient, odd = slopes_of(cost, points)
            nearest.best.odd.logical_or_(odd)
            points.grad = gradient / per_example(gradient.flatten(1).abs().amax(1).clamp(min=1e-12), x)
            adam.step()
            size = cosine(self.step_size, self.step_size / 10, step, self.steps)
            adam.param_groups[0]["lr"] = size
            threshold = (threshold + torch.where(wrong, 1, -1) * self.pace * size).clamp(0, 1)
            with torch.no_grad():
                points.clamp_(threat.low, threat.high)
                points.copy_(torch.where((points - x).abs() < per_example(threshold, x), x, points))


def smooth_count(delta: Tensor, sigma: float) -> Tensor:
    """Σ δ² / (δ² + σ) of each example, (n,): the number of entries that are not 0, as σ goes to 0."""
    square = delta.flatten(1).square()
    return (square / (square + sigma)).sum(1)
