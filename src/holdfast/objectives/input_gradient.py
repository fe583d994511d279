"""Training that flattens the loss around the inputs: TULIP, input gradients, CURE, LLR."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from holdfast.fold import frozen_copy
from holdfast.inference import frozen_eval
from holdfast.objectives.objective import Loss, Objective, Perturbing, Progress, Searching, repeated
from holdfast.search import per_example
from holdfast.threat import Threat


def gradient_in_eval(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of each example's cross-entropy at x, a constant, (N, ...); leaves no trace on the model."""
    with frozen_eval(model), torch.enable_grad():
        points = x.clone().requires_grad_(True)
        total = F.cross_entropy(model(points), y, reduction="sum")
        return torch.autograd.grad(total, points)[0]


def directional(gradient: Tensor, delta: Tensor) -> Tensor:
    """⟨gradient, delta⟩ of each example, (N,)."""
    return (gradient * delta).flatten(1).sum(1)


class TULIP(Perturbing, name="tulip"):
    """CE + λ · ½ ((CE(x + h v) − CE(x)) / h)², v the unit direction of the input gradient: a penalty on its length
    by a finite difference (Finlay & Oberman, 2021; "GR" of Yang et al., 2020).

    v comes from an eval-mode pass and is a constant; x + h v may leave the box. As h → 0 the penalty becomes half
    the squared length. The code of Yang et al. counts the clean gradient twice; here it counts once.
    """

    weight: NonNegativeFloat = 1.0
    """λ, the weight of the penalty on the gradient's length."""
    h: PositiveFloat = 1.0
    """Length of the step, in input units."""
    direction: Literal["l2", "threat"] = "l2"
    """Unit length in l_2, or the steepest direction in the threat's own norm."""

    def perturbed(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> Tensor:
        gradient = gradient_in_eval(model, x, y)
        if self.direction == "l2":
            length = gradient.flatten(1).norm(dim=1)
            v = gradient / per_example(length.masked_fill(length == 0, 1), x)
        else:
            v = threat.steepest(gradient, x)
        return x + self.h * v

    def loss_at(
        self, model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, threat: Threat, progress: Progress
    ) -> Loss:
        here, there = F.cross_entropy(model(torch.cat([x, x_adv])), repeated(y, 2), reduction="none").chunk(2)
        natural = here.mean()
        penalty = (0.5 * ((there - here) / self.h).square()).mean()
        parts = {"cross_entropy": natural.detach(), "penalty": penalty.detach()}
        return Loss(natural + self.weight * penalty, parts)


class InputGradient(Objective, name="input-gradient"):
    """CE + λ · ½ ‖∇_x CE‖₂² by differentiating twice (Drucker & LeCun, 1992; Ross & Doshi-Velez, 2018)."""

    weight: NonNegativeFloat = 1.0
    """λ, the weight of the penalty on the gradient's length."""

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> Loss:
        points = x.clone().requires_grad_(True)
        each = F.cross_entropy(model(points), y, reduction="none")
        gradient = torch.autograd.grad(each.sum(), points, create_graph=True)[0]
        penalty = 0.5 * gradient.flatten(1).square().sum(1).mean()
        natural = each.mean()
        parts = {"cross_entropy": natural.detach(), "penalty": penalty.detach()}
        return Loss(natural + self.weight * penalty, parts)


class CURE(Perturbing, name="cure"):
    """CE + γ · ‖∇CE(x + h z) − ∇CE(x)‖₂², z the unit sign of the gradient: small curvature (Moosavi-Dezfooli
    et al., 2019)."""

    weight: NonNegativeFloat = 4.0
    """γ, the weight of the curvature."""
    h: PositiveFloat = 1.5
    """Length of the step in l_2, in input units."""

    def perturbed(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> Tensor:
        sign = gradient_in_eval(model, x, y).sign()
        length = sign.flatten(1).norm(dim=1)
        return x + self.h * (sign / per_example(length.masked_fill(length == 0, 1), x))

    def loss_at(
        self, model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, threat: Threat, progress: Progress
    ) -> Loss:
        points = torch.cat([x, x_adv]).requires_grad_(True)
        each = F.cross_entropy(model(points), repeated(y, 2), reduction="none")
        here, there = torch.autograd.grad(each.sum(), points, create_graph=True)[0].chunk(2)
        penalty = (there - here).flatten(1).square().sum(1).mean()
        natural = each[: len(x)].mean()
        parts = {"cross_entropy": natural.detach(), "curvature": penalty.detach()}
        return Loss(natural + self.weight * penalty, parts)


class LLR(Searching, name="llr"):
    """CE + λ γ + μ |⟨δ, ∇CE⟩|: the loss shall be linear in the threat set (Qin et al., 2019).

    γ = |CE(x + δ) − CE(x) − ⟨δ, ∇CE(x)⟩|, with the δ for which ascent finds it largest. Everything is per
    example, δ is projected as the threat says, and the gradient is differentiated. In the code of Yang et al.
    (2020) the gradient is wiped before it is used, so that it trains another loss.
    """

    weight: NonNegativeFloat = 4.0
    """λ, the weight of the largest deviation from linearity."""
    mu: NonNegativeFloat = 3.0
    """μ, the weight of the slope along the perturbation found."""
    ramp_end: float = Field(default=0.0, ge=0, le=1)
    """Share of the training at which λ and μ have grown from 0 to their values. At full weight from the first step
    a network whose last layer starts at 0 may never leave the constant answer."""
    steps: PositiveInt = 2
    """Steps of the inner ascent."""
    step_size: PositiveFloat = 0.5
    """Length of a step in units of eps."""

    def perturbed(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> Tensor:
        gradient = gradient_in_eval(model, x, y)
        start = threat.project(x, x + 0.001 * progress.normal(x))
        with frozen_copy(model, x, self.steps) as copy:
            with torch.no_grad():
                clean = F.cross_entropy(copy(x), y, reduction="none")

            def deviation(points: Tensor, rows: Tensor) -> tuple[Tensor, None]:
                there = F.cross_entropy(copy(points), y[rows], reduction="none")
                return (there - clean[rows] - directional(gradient[rows], points - x[rows])).abs(), None

            return self.climbed(deviation, x, threat, start)

    def loss_at(
        self, model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, threat: Threat, progress: Progress
    ) -> Loss:
        delta = x_adv - x
        points = torch.cat([x, x_adv]).requires_grad_(True)
        each = F.cross_entropy(model(points), repeated(y, 2), reduction="none")
        here, there = each.chunk(2)
        slope = torch.autograd.grad(here.sum(), points, create_graph=True)[0][: len(x)]
        linear = directional(slope, delta)
        natural, gamma, drop = here.mean(), (there - here - linear).abs().mean(), linear.abs().mean()
        parts = {"cross_entropy": natural.detach(), "gamma": gamma.detach(), "slope": drop.detach()}
        share = progress.ramp(self.ramp_end)
        return Loss(natural + share * (self.weight * gamma + self.mu * drop), parts, x_adv)
