"""Training for randomised smoothing: Gaussian noise, and what makes the vote under noise surer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from holdfast.attacks.losses import floored
from holdfast.component import PositiveNumber
from holdfast.inference import frozen_eval
from holdfast.objectives.objective import Loss, Objective, Progress, Searching, labels_only, repeated
from holdfast.threat import Threat


class _Noisy(Objective):
    """What they share: images under Gaussian noise, which may leave the box."""

    sigma: PositiveNumber = 0.25
    """Standard deviation of the noise, in input units."""

    def noise(self, x: Tensor, copies: int, progress: Progress) -> Tensor:
        """Of so many copies of the batch, one behind the other, (copies · N, ...)."""
        return self.sigma * progress.normal(x, copies, 11)


class GaussianNoise(_Noisy, name="gaussian-noise"):
    """Cross-entropy on noisy images (Cohen et al., 2019)."""

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> Loss:
        total = F.cross_entropy(model(x + self.noise(x, 1, progress)), y)
        return Loss(total, {"cross_entropy": total.detach()})


class SmoothAdv(_Noisy, Searching, name="smooth-adv"):
    """Cross-entropy on noisy adversarial examples of the smoothed classifier (Salman et al., 2019).

    PGD raises −log of the mean probability of the label over the copies; training sees the same noise.
    """

    copies: PositiveInt = 2
    """Noise vectors per image."""
    steps: PositiveInt = 4
    """Steps of the inner ascent."""
    step_size: PositiveFloat = 0.5
    """Length of a step in units of eps."""
    ramp_end: NonNegativeFloat = 0.2
    """Share of the training at which the radius has grown to eps."""

    def perturbed(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress
    ) -> tuple[Tensor, Tensor]:
        """The images before the noise, (N, ...), and the noise, (copies, N, ...)."""
        now = threat.with_eps(progress.ramp(self.ramp_end) * threat.eps)
        noise = self.noise(x, self.copies, progress).view(self.copies, *x.shape)

        def function(points: Tensor, rows: Tensor) -> tuple[Tensor, None]:
            noisy = (points + noise[:, rows]).flatten(0, 1)
            labels = repeated(y[rows], self.copies)
            log_probability = -F.cross_entropy(model(noisy), labels, reduction="none").view(self.copies, -1)
            return math.log(self.copies) - log_probability.logsumexp(0), None

        with frozen_eval(model):
            x_adv = self.climbed(function, x, now, x) if now.eps else x
        return x_adv, noise

    def loss_at(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        x_adv: tuple[Tensor, Tensor],
        threat: Threat,
        progress: Progress,
    ) -> Loss:
        points, noise = x_adv
        total = F.cross_entropy(model((points + noise).flatten(0, 1)), repeated(y, self.copies))
        return Loss(total, {"cross_entropy": total.detach()}, points)


class MACER(_Noisy, name="macer"):
    """Cross-entropy of the mean probabilities + λ σ / 2 · hinge of the radius of what is right (Zhai et al., 2020).

    The radius is σ / 2 (Φ⁻¹ p_y − Φ⁻¹ p_2) of probabilities softened by β; what exceeds γ is left alone.
    """

    copies: PositiveInt = 8
    """Noise vectors per image."""
    weight: NonNegativeFloat = 12.0
    """λ, the weight of the radius hinge."""
    gamma: PositiveFloat = 8.0
    """γ, beyond which a radius need not grow, in standard deviations of the noise."""
    beta: PositiveFloat = 16.0
    """β, the inverse temperature of the softmax that radii are taken from."""

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> Loss:
        noisy = x.repeat(self.copies, *[1] * (x.dim() - 1)) + self.noise(x, self.copies, progress)
        logits = model(noisy).view(self.copies, len(x), -1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # quantiles need it
        mean = logits.softmax(2).mean(0)
        natural = F.nll_loss((mean + 1e-10).log(), labels_only(y))
        soft = (self.beta * logits).softmax(2).mean(0)
        best, order = soft.topk(2, dim=1)
        rows = (order[:, 0] == y).nonzero().squeeze(1)
        quantiles = torch.special.ndtri(best[rows].clamp(1e-6, 1 - 1e-6))
        lead = quantiles[:, 0] - quantiles[:, 1]
        hinge = (self.gamma - lead).clamp(min=0).sum() * self.sigma / 2 / len(x)
        parts = {"cross_entropy": natural.detach(), "radius_hinge": hinge.detach()}
        return Loss(natural + self.weight * hinge, parts)


class Consistency(_Noisy, name="consistency"):
    """Noisy cross-entropy + λ · mean KL(p̄ ‖ p_i) + η · entropy of the mean p̄ (Jeong & Shin, 2020)."""

    copies: PositiveInt = 2
    """Noise vectors per image."""
    weight: NonNegativeFloat = 10.0
    """λ, the weight of the divergence between the noisy answers."""
    entropy: NonNegativeFloat = 0.5
    """η, the weight of the entropy of the mean answer."""

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> Loss:
        noisy = x.repeat(self.copies, *[1] * (x.dim() - 1)) + self.noise(x, self.copies, progress)
        logs = floored(model(noisy).log_softmax(1)).view(self.copies, len(x), -1)
        natural = F.nll_loss(logs.flatten(0, 1), repeated(labels_only(y), self.copies))
        mean = logs.exp().mean(0)
        log_mean = mean.clamp(min=1e-20).log()
        divergence = (mean * (log_mean - logs)).sum(2).mean()
        spread = -(mean * log_mean).sum(1).mean()
        parts = {"cross_entropy": natural.detach(), "divergence": divergence.detach(), "entropy": spread.detach()}
        return Loss(natural + self.weight * divergence + self.entropy * spread, parts)


class Stability(_Noisy, name="stability"):
    """Clean cross-entropy + λ · cross-entropy of the noisy answer to the clean one (Li et al., 2019)."""

    weight: NonNegativeFloat = 2.0
    """λ, the weight of the noisy answer's distance from the clean one."""

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> Loss:
        clean, noisy = model(torch.cat([x, x + self.noise(x, 1, progress)])).chunk(2)
        natural = F.cross_entropy(clean, y)
        stability = -(clean.softmax(1) * floored(noisy.log_softmax(1))).sum(1).mean()
        parts = {"cross_entropy": natural.detach(), "stability": stability.detach()}
        return Loss(natural + self.weight * stability, parts)
