"""Adversarial weight perturbation, around any other loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from holdfast.component import PositiveNumber
from holdfast.inference import without_trace
from holdfast.objectives.adversarial import AdversarialTraining
from holdfast.objectives.objective import Loss, Objective, Perturbing, Progress
from holdfast.threat import Threat


class AWP(Objective, name="awp"):
    """The loss of another objective at weights w + v, v the steepest step that raises it (Wu et al., 2020).

    v_l = γ ‖w_l‖ g_l / ‖g_l‖ for every weight of two or more dimensions, g the gradient of the loss at w, over the
    images of all processes. The inputs that the objective's search found at w serve both passes, both draw the same
    random numbers, and neither BatchNorm statistics nor gradients keep a trace of the first. What is no search for
    inputs belongs to the loss and is made in both: slopes of relaxations, the latent points of STAPS, and all that
    an objective from elsewhere does that is not ``Perturbing``. Where batches are accumulated, each takes a step of
    its own.
    """

    objective: Objective = AdversarialTraining()
    """The loss that is made flat."""
    gamma: PositiveNumber = 0.005
    """γ, the length of the step of the weights relative to their own."""
    begin: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training before which the weights are left where they are."""

    @model_validator(mode="after")
    def _refuse_replays(self) -> Self:
        if self.objective.steps_per_batch > 1:
            raise ValueError(f"{self.objective.name} replays its batches, which awp would perturb each time anew")
        return self

    def initialise(self, model: nn.Module, seed: int) -> None:
        self.objective.initialise(model, seed)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> Loss:
        inner, x_adv = self.objective, None
        if isinstance(inner, Perturbing):
            x_adv = inner.perturbed(model, x, y, threat, progress)
        at = _LossAt(model, inner, threat, progress)
        if progress.fraction < self.begin:
            return at(x, y, x_adv)
        weights = {name: p for name, p in at.named_parameters() if p.requires_grad and p.dim() > 1}
        with torch.enable_grad(), without_trace(model):
            total = at(x, y, x_adv).total
            own = torch.autograd.grad(progress.share * total, list(weights.values()), allow_unused=True)
        gradients = _over_processes(own, list(weights.values()), progress)
        with torch.no_grad():
            moved = {
                name: self.gamma * weight.norm() / gradient.norm().clamp(min=1e-20) * gradient
                for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
                if gradient is not None
            }
        perturbed = {name: weights[name] + step for name, step in moved.items()}
        loss: Loss = torch.func.functional_call(at, perturbed, (x, y, x_adv))
        return Loss(loss.total, {**loss.parts, "unperturbed": total.detach()}, loss.x_adv)

    def present(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> None:
        """What the inner objective trains on, at the weights as they are."""
        self.objective.present(model, x, y, threat, progress)


def _over_processes(
    own: Sequence[Tensor | None], weights: Sequence[Tensor], progress: Progress
) -> Sequence[Tensor | None]:
    """The sums of the processes' gradients."""
    if progress.processes == 1:
        return own
    parts = [torch.zeros_like(w) if g is None else g for g, w in zip(own, weights, strict=True)]
    total = torch.cat([part.flatten() for part in parts])
    torch.distributed.all_reduce(total)
    return [part.view_as(w) for part, w in zip(total.split([w.numel() for w in weights]), weights, strict=True)]


class _LossAt(nn.Module):
    """A loss as a module, so that the weights inside can be exchanged for one call."""

    def __init__(self, model: nn.Module, objective: Objective, threat: Threat, progress: Progress) -> None:
        super().__init__()
        self.model, self.objective, self.threat, self.progress = model, objective, threat, progress
        self.training = model.training

    def forward(self, x: Tensor, y: Tensor, x_adv: Any) -> Loss:
        if isinstance(self.objective, Perturbing):
            return self.objective.loss_at(self.model, x, y, x_adv, self.threat, self.progress)
        return self.objective.loss(self.model, x, y, self.threat, self.progress)
