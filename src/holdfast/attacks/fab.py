"""FAB: the nearest adversarial example by walking along the linearised decision boundary."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from holdfast.attacks.attack import GradientAttack, Targets, require_answers, with_own
from holdfast.attacks.losses import asked
from holdfast.attacks.pgd import likeliest
from holdfast.search import Ascent, per_example, slopes_of
from holdfast.threat import Threat

STRIDE = 10_000
"""Walks are numbered by restart in blocks of so many classes."""


class FAB(GradientAttack, name="fab"):
    """Fast adaptive boundary attack, towards one likely class after the other (Croce & Hein, 2020).

    From a point, the boundary z_t = z_y is linearised; the point and the original are both projected onto it
    within the box, and the next point lies between the two projections, a little beyond the boundary. A
    wrong point counts with its distance, and the walk goes on from a tenth nearer the original. Without
    targets each step takes the class whose linearised boundary is nearest, at one backward pass per class.
    """

    minimum_norm: ClassVar[bool] = True
    steps: PositiveInt = 100
    """Gradient steps towards each class."""
    targets: PositiveInt = 9
    """The so many likeliest other classes."""
    targeted: bool = True
    """Walk towards these classes, one after the other; otherwise one walk, towards whichever class is nearest."""
    restarts: PositiveInt = 1
    """Walks towards each class; the first begins at the input, the others near it at random."""
    overshoot: float = Field(default=1.05, ge=1)
    """How far to go, as a multiple of the way to the boundary."""
    pull: float = Field(default=0.1, gt=0, le=1)
    """Largest weight of the original's own projection."""
    back: PositiveFloat = 0.9
    """What is kept of the perturbation after a success."""
    within_eps: bool = False
    """Stop at the first success within eps: for an accuracy at eps, not for the distances."""

    @property
    def title(self) -> str:
        return f"FAB-T-{self.steps} × {self.targets}" if self.targeted else f"FAB-{self.steps}"

    def perturb(self, model: nn.Module, targets: Targets, threat: Threat) -> Ascent:
        if not self.within_eps:  # what certificates exclude within eps may be the nearest beyond it
            targets = targets._replace(open=with_own(targets.logits.isfinite(), targets.y))
        classes = torch.stack(likeliest(targets, self.targets if self.targeted else 1), 1)
        result = Ascent.before(targets.x)
        best = torch.full((len(targets.x),), torch.inf, dtype=targets.x.dtype, device=targets.x.device)
        for restart in range(self.restarts):
            for number in range(classes.shape[1]):
                everyone = torch.arange(len(best), device=best.device)
                standing = everyone[classes[:, number] >= 0]
                standing = standing[best[standing] > threat.eps] if self.within_eps else standing
                for rows in standing.split(targets.batch_size):
                    self._walk(
                        model,
                        targets.take(rows),
                        classes[rows, number],
                        threat,
                        restart,
                        number,
                        result,
                        best,
                        rows,
                    )
        result.value.copy_(torch.where(best < torch.inf, -best, -torch.inf))
        result.finished.copy_(best < torch.inf)
        return result

    def _walk(
        self,
        model: nn.Module,
        targets: Targets,
        target: Tensor,
        threat: Threat,
        restart: int,
        number: int,
        result: Ascent,
        best: Tensor,
        rows: Tensor,
    ) -> None:
        x, y = targets.x, targets.y
        points = x
        if restart:
            reach = torch.minimum(best[rows], torch.full_like(best[rows], threat.eps))
            drawn = threat.random_point(x, targets.draws(4, restart, number)) - x
            scale = reach / threat.distance(x, x + drawn).clamp(min=1e-12) / 2
            points = (x + per_example(scale, x) * drawn).clamp(threat.low, threat.high)
        for step in range(self.steps):
            points = points.detach().requires_grad_(True)
            with torch.enable_grad():
                gaps, _ = asked(model, points, y, partial(differences, y), self.samples)
                gap = gaps.gather(1, target[:, None]).squeeze(1)
            if self.targeted:
                gradient, odd = slopes_of(gap, points)
            else:
                gap, gradient, odd = nearest_boundary(gaps, y, points, threat)
                result.backwards[rows] += gaps.shape[1] - 2
            points = self._step(x, points.detach(), gradient, gap.detach(), threat)
            with torch.no_grad():
                answer, wrong = asked(model, points, y, lambda logits: logits, self.samples)
            require_answers(answer)
            result.odd[rows] |= odd
            result.forwards[rows] += 2
            result.backwards[rows] += 1
            distance = threat.distance(x, points)
            nearer = wrong & (distance < best[rows])
            hit = rows[nearer]
            result.x[hit], best[hit] = points[nearer], distance[nearer]
            result.restart[hit], result.step[hit] = restart * STRIDE + number, step + 1
            points = torch.where(per_example(wrong, x), x + self.back * (points - x), points)
            if self.within_eps and (best[rows] <= threat.eps).any():
                keep = best[rows] > threat.eps
                rows, x, y, target, points = rows[keep], x[keep], y[keep], target[keep], points[keep]
                if not len(rows):
                    break

    def _step(self, x: Tensor, points: Tensor, gradient: Tensor, gap: Tensor, threat: Threat) -> Tensor:
        """Between the projections of the point and of the original onto gap + ⟨gradient, · − points⟩ = 0."""
        there = (gradient * (x - points)).flatten(1).sum(1) + gap  # the linear function at the original
        both = threat.shortest_step(
            torch.cat([points, x]), gradient.repeat(2, *[1] * (x.dim() - 1)), -torch.cat([gap, there])
        )
        own, original = both.chunk(2)
        length, length_original = threat.distance(both.new_zeros(()), both).clamp(min=1e-8).chunk(2)
        alpha = per_example((length / (length + length_original)).clamp(max=self.pull), x)
        mixed = torch.lerp(
            torch.add(points, own, alpha=self.overshoot), torch.add(x, original, alpha=self.overshoot), alpha
        )
        finite = per_example(torch.isfinite(mixed.flatten(1).sum(1)), x)  # a vanishing gradient points nowhere
        return torch.where(finite, mixed, points).clamp(threat.low, threat.high)

    def describe(self, restart: int, step: int) -> str:
        target = f" target {restart % STRIDE}" if self.targeted else ""
        return f"{self.name} restart {restart // STRIDE}{target} step {step}"


def differences(y: Tensor, logits: Tensor) -> Tensor:
    """z_k − z_y for every class, (n, K)."""
    return logits - logits.gather(1, y[:, None])


def nearest_boundary(gaps: Tensor, y: Tensor, points: Tensor, threat: Threat) -> tuple[Tensor, Tensor, Tensor]:
    """The gap z_k − z_y (n,) and its gradient for the class k ≠ y with the least |gap| / ‖gradient‖_dual; and
    whether some gradient had to be ``tamed``, (n,).

    Args:
        gaps: z_k − z_y for every class, (n, K), differentiable in the points.
    """
    nearest = torch.full_like(gaps[:, 0], torch.inf)
    gap, gradient, strange = gaps[:, 0].detach().clone(), torch.zeros_like(points), torch.zeros_like(y).bool()
    for k in range(gaps.shape[1]):
        slope, odd = slopes_of(gaps[:, k], points, keep=k + 1 < gaps.shape[1])
        strange |= odd
        away = gaps[:, k].detach().abs() / threat.dual_length(slope).clamp(min=1e-12)
        better = (y != k) & (away < nearest)
        nearest = torch.where(better, away, nearest)
        gap = torch.where(better, gaps[:, k].detach(), gap)
        gradient = torch.where(per_example(better, points), slope, gradient)
    return gap, gradient, strange
