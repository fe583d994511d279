"""What the certified training losses share: a ramp of the radius, a mix with the clean loss, one traced graph."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from holdfast.bounds import Graph, Region, UnsupportedOperator, batch_statistics, region_of, trace
from holdfast.bounds.graph import Statistics
from holdfast.fold import BATCH_NORMS
from holdfast.inference import mix_seed
from holdfast.objectives.objective import Loss, Perturbing, Progress, labels_only
from holdfast.threat import Threat


@dataclass(frozen=True)
class Batch:
    """A batch at one step of the ramp."""

    model: nn.Module
    graph: Graph
    """Of the model, on the statistics of the clean batch."""
    x: Tensor
    y: Tensor
    threat: Threat
    """At the radius of the step."""
    ramp: float
    """How far the ramp is, 0 to 1."""
    progress: Progress

    x_adv: Tensor | None
    """What the objective attacked first, (N, ...)."""

    @property
    def region(self) -> Region:
        return region_of(self.x, self.threat)


@dataclass(frozen=True)
class Robust:
    """The robust part of a loss."""

    loss: Tensor
    """(N,)."""
    extra: Tensor | None = None
    """Scalar, added as it is: a regulariser."""


class CertifiedTraining(Perturbing):
    """κ · clean cross-entropy + (1 − κ) · a loss on bounds.

    While training runs from ``warmup`` to ``ramp_end`` the radius grows from 0 to eps and κ falls from 1 to
    ``kappa``; from there on both stay. Where the model has BatchNorm, bounds and clean pass share the
    statistics of the clean batch; Dropout does not perturb the bounds.
    """

    kappa: float = Field(default=0.0, ge=0, le=1)
    """Weight of the clean loss at the end of the ramp."""
    warmup: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training that is natural."""
    ramp_end: float = Field(default=0.5, gt=0, le=1)
    """Share of the training at which the radius has reached eps."""
    ramp_shape: Literal["linear", "smoothed"] = "linear"
    """``smoothed`` begins with a fourth power over the first quarter of the ramp and goes on in a straight line."""

    initialisation: Literal["model", "shi"] = "model"
    """``shi`` draws weights with deviation √(2π) / fan-in, for which intervals keep their width through a ReLU."""

    def initialise(self, model: nn.Module, seed: int) -> None:
        if self.initialisation == "shi":
            wide_initialisation(model, seed)

    def perturbed(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress
    ) -> Tensor | None:
        """What the bounded part attacks, (N, ...); None where it attacks nothing, or does not count yet."""
        labels_only(y)
        ramp = self.ramp(progress)
        if self.weight_of_clean(ramp) == 1:
            return None
        return self.attack(model, x, y, threat.with_eps(ramp * threat.eps), progress)

    def attack(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> Tensor | None:
        """An attack within the radius of the step, on the model in eval mode; none by default."""
        return None

    def loss_at(
        self, model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor | None, threat: Threat, progress: Progress
    ) -> Loss:
        ramp = self.ramp(progress)
        kappa = self.weight_of_clean(ramp)
        parts: dict[str, Tensor] = {}
        statistics: Statistics = {}
        natural = None
        if kappa > 0 or any(isinstance(module, BATCH_NORMS) for module in model.modules()):
            with batch_statistics(model) as statistics:
                natural = F.cross_entropy(model(x), y, reduction="none").mean()
            parts = {"cross_entropy": natural.detach()}
            if kappa == 1:
                return Loss(natural, parts)
        now, graph = threat.with_eps(ramp * threat.eps), trace(model, x, statistics)
        if not all(head.log for head in graph.heads):
            raise UnsupportedOperator("the loss is taken of logits and has a softmax itself: leave the model's out")
        robust = self.robust(Batch(model, graph, x, y, now, ramp, progress, x_adv))
        mean = robust.loss.mean()
        # A term of weight 0 is left out: no forward is made and nothing differentiated for it alone.
        total = mean if natural is None or kappa == 0 else kappa * natural + (1 - kappa) * mean
        parts["robust_cross_entropy"] = mean.detach()
        if robust.extra is not None:
            total = total + robust.extra
            parts["regulariser"] = robust.extra.detach()
        return Loss(total, parts, x_adv)

    def present(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> None:
        """The clean batch, whose statistics the bounds share."""
        model(x)

    @abstractmethod
    def robust(self, batch: Batch) -> Robust:
        """The loss on bounds of each example."""

    def weight_of_clean(self, ramp: float) -> float:
        """κ."""
        return 1 - ramp * (1 - self.kappa)

    def ramp(self, progress: Progress) -> float:
        """0 until the warm-up ends, 1 from ``ramp_end`` on, growing between."""
        share = progress.ramp(self.ramp_end, self.warmup)
        return share if self.ramp_shape == "linear" else smoothed(share)


def smoothed(share: float, middle: float = 0.25) -> float:
    """α s⁴ up to ``middle``, then its tangent, which reaches 1 at s = 1 (Xu et al., 2020)."""
    alpha = 1 / ((1 - middle) * 4 * middle**3 + middle**4)
    if share < middle:
        return alpha * share**4
    return alpha * (middle**4 + 4 * middle**3 * (share - middle))


@torch.no_grad()
def wide_initialisation(model: nn.Module, seed: int) -> None:
    """Weights of convolutions and dense layers from N(0, 2π / fan-in²), biases 0 (Shi et al., 2021, 3.1)."""
    for number, module in enumerate(model.modules()):
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            generator = torch.Generator().manual_seed(mix_seed(seed, number, 9))
            draws = torch.randn(module.weight.shape, generator=generator)
            module.weight.copy_(draws * math.sqrt(2 * math.pi) / module.weight[0].numel())
            if module.bias is not None:
                module.bias.zero_()
