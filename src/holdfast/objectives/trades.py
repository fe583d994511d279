"""TRADES."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from holdfast.attacks.losses import divergence
from holdfast.fold import frozen_copy
from holdfast.inference import eval_mode
from holdfast.objectives.objective import Loss, Progress, Searching
from holdfast.threat import Threat


class TRADES(Searching, name="trades"):
    """Clean cross-entropy plus β times the divergence of the perturbed from the clean answer
    (Zhang et al., 2019, equation 5).

    mean CE(f(x), y) + β · mean KL(f(x) ‖ f(x')), x' the last point of an ascent of the same divergence in
    eval mode. Gradients flow through both arguments. Clean and perturbed inputs make one forward pass,
    so a BatchNorm sees both halves once; the original makes three passes.
    """

    beta: NonNegativeFloat = 6.0
    """Weight of the divergence."""
    frozen_statistics: bool = False
    """Make the training forward in eval mode, so that a BatchNorm keeps the statistics it started with: what the
    code of Su et al. (2024) does, and no other."""
    reduction: Literal["mean", "unbalanced"] = "mean"
    """``unbalanced`` divides the divergence once more by the number of images in the batch, as the unprefixed
    ``trades`` of Yang et al. (2020) does, which adds a mean to a sum; their ``strades`` is ``mean``."""

    def perturbed(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> Tensor:
        # At x itself the divergence has no slope, so the ascent starts a hair away from it.
        start = threat.project(x, x + 0.001 * progress.normal(x))
        with frozen_copy(model, x, self.steps) as copy:
            with torch.no_grad():
                clean = model(x)
            return self.climbed(
                lambda points, rows: (divergence(clean[rows], copy(points)), None), x, threat, start
            )

    def loss_at(
        self, model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, threat: Threat, progress: Progress
    ) -> Loss:
        with eval_mode(model) if self.frozen_statistics else nullcontext():
            clean, perturbed = model(torch.cat([x, x_adv])).chunk(2)
        natural = F.cross_entropy(clean, y, reduction="none").mean()
        robust = divergence(clean, perturbed).mean()
        if self.reduction == "unbalanced":
            robust = robust / (progress.images or len(x))
        parts = {"cross_entropy": natural.detach(), "divergence": robust.detach()}
        return Loss(natural + self.beta * robust, parts, x_adv)
