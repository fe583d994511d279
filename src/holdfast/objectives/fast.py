"""Adversarial training with a single gradient step, or with none of its own."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, PrivateAttr
from torch import Tensor, nn

from holdfast.inference import eval_mode
from holdfast.objectives.input_gradient import gradient_in_eval
from holdfast.objectives.objective import Loss, Objective, Perturbing, Progress
from holdfast.threat import Threat


class FastAT(Perturbing, name="fast-at"):
    """Cross-entropy of one steepest step from a random start (Wong et al., 2020), with GradAlign if asked for
    (Andriushchenko & Flammarion, 2020): λ (1 − cos(∇CE(x), ∇CE(x + η))), η uniform in the ball.

    ``uniform`` starts in the threat set and projects the step (FGSM-RS); ``wide`` starts in the ball of twice the
    radius, steps by eps and does not project onto the ball again (N-FGSM; de Jorge et al., 2022).
    """

    start: Literal["uniform", "wide"] = "uniform"
    """Where the step begins."""
    step_size: PositiveFloat = 1.25
    """Length of the step in units of eps; N-FGSM takes 1."""
    grad_align: NonNegativeFloat = 0.0
    """λ, the weight of the misalignment of gradients (GradAlign); 0 for none. The paper has 0.2 for 8/255."""

    def perturbed(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> Tensor:
        wide = self.start == "wide"
        start = progress.random_points(x, threat.with_eps(2 * threat.eps) if wide else threat)
        direction = threat.steepest(gradient_in_eval(model, start, y), start)
        moved = start + self.step_size * threat.eps * direction
        return moved.clamp(threat.low, threat.high) if wide else threat.project(x, moved)

    def loss_at(
        self, model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, threat: Threat, progress: Progress
    ) -> Loss:
        robust = F.cross_entropy(model(x_adv), y)
        parts = {"adversarial_cross_entropy": robust.detach()}
        if not self.grad_align:
            return Loss(robust, parts, x_adv)
        penalty = (1 - self._alignment(model, x, y, threat, progress)).mean()
        parts["misalignment"] = penalty.detach()
        return Loss(robust + self.grad_align * penalty, parts, x_adv)

    def _alignment(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> Tensor:
        """cos of the input gradients at x and at a random point, (N,), differentiable; in eval mode."""
        with eval_mode(model):
            gradients = []
            for points in (x.clone(), progress.random_points(x, threat)):
                points.requires_grad_(True)
                total = F.cross_entropy(model(points), y, reduction="sum")
                gradients.append(torch.autograd.grad(total, points, create_graph=True)[0].flatten(1))
        return F.cosine_similarity(gradients[0], gradients[1], dim=1, eps=1e-12)


class FreeAT(Objective, name="free-at"):
    """Cross-entropy of inputs that move by one steepest step at each replay of a batch (Shafahi et al., 2019).

    Every batch makes m optimiser steps; the backward pass of each also gives the input gradient that moves the
    perturbation for the next. An epoch has m times as many steps, so that the paper divides the epochs by m. The
    perturbation of a new batch starts at random, where the paper's goes on from the last batch: so a resumed run
    ends in the same weights.
    """

    replays: PositiveInt = 8
    """m, how often each batch is replayed: optimiser steps per batch."""
    step_size: PositiveFloat = 1.0
    """Length of a step in units of eps."""
    _last: tuple[int, int, Tensor] | None = PrivateAttr(default=None)
    """Of the step before: the model's identity, the step, the points with their gradient."""

    @property
    def steps_per_batch(self) -> int:
        return self.replays

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> Loss:
        identity, step, points = self._last or (0, -1, x)
        follows = identity == id(model) and step == progress.step - 1 and points.grad is not None
        if progress.step % self.replays and follows and points.grad is not None:
            moved = points.detach() + self.step_size * threat.eps * threat.steepest(points.grad, points.detach())
            x_adv = threat.project(x, moved)
        else:
            x_adv = progress.random_points(x, threat)
        points = x_adv.clone().requires_grad_(torch.is_grad_enabled())
        robust = F.cross_entropy(model(points), y)
        self._last = id(model), progress.step, points
        return Loss(robust, {"adversarial_cross_entropy": robust.detach()}, x_adv)

    def present(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> None:
        """All replays of the batch, of which ``progress`` is the first; the perturbation moves as in training."""
        other = self.model_copy()
        for number in range(self.replays):
            total = other.loss(
                model, x, y, threat, dataclasses.replace(progress, step=progress.step + number)
            ).total
            if other._last is not None:
                points = other._last[2]
                points.grad = torch.autograd.grad(total, points)[0]
