"""What the certified training losses share: a ramp of the radius, a mix with the clean loss, one traced graph."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat
from torch import Tensor, nn

from holdfast.bounds import (
    Graph,
    Interval,
    Rectifier,
    Region,
    UnsupportedOperator,
    batch_statistics,
    region_of,
    robust_cross_entropy,
)
from holdfast.bounds.carried import trace_step
from holdfast.bounds.graph import Statistics
from holdfast.bounds.specification import interval_values
from holdfast.component import PositiveNumber
from holdfast.fold import BATCH_NORMS
from holdfast.inference import mix_seed
from holdfast.layers import Normalize
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
    def attacked(self) -> Tensor:
        """That, or where nothing is attacked the inputs."""
        return self.x if self.x_adv is None else self.x_adv

    @property
    def region(self) -> Region:
        return region_of(self.x, self.threat)


@dataclass(frozen=True)
class Robust:
    """The robust part of a loss."""

    loss: Tensor
    """(N,)."""
    values: dict[int, Interval] | None = None
    """The intervals on the way, where the loss has them."""
    margins: Tensor | None = None
    """Of the network at the clean inputs, (N, K−1), where the loss comes across them."""


class CertifiedTraining(Perturbing):
    """κ · clean cross-entropy + (1 − κ) · a loss on bounds + Shi's regulariser, where it is asked for.

    While training runs from ``warmup`` to ``ramp_end`` the radius grows from 0 to ``radius`` · eps and κ goes from
    ``start_kappa`` to ``kappa``; from there on both stay. Where the model has BatchNorm, bounds and clean pass
    share the statistics of the clean batch; Dropout does not perturb the bounds.
    """

    radius: PositiveNumber = 1.0
    """Radius at the end of the ramp, relative to the threat model's: small networks are often trained for more than
    they are tested at."""
    kappa: float = Field(default=0.0, ge=0, le=1)
    """Weight of the clean loss at the end of the ramp."""
    start_kappa: float = Field(default=1.0, ge=0, le=1)
    """Weight of the clean loss until the ramp begins; as large as ``kappa`` for a constant weight."""
    warmup: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training that is natural."""
    ramp_end: float = Field(default=0.5, gt=0, le=1)
    """Share of the training at which the radius has reached eps."""
    ramp_shape: Literal["linear", "smoothed"] = "linear"
    """``smoothed`` begins with a fourth power over the first quarter of the ramp and goes on in a straight line."""

    initialisation: Literal["model", "shi"] = "model"
    """``shi`` draws weights with deviation √(2π) / fan-in, for which intervals keep their width through a ReLU."""
    regularisation: NonNegativeFloat = 0.0
    """Weight of the regulariser of Shi et al. (2021) until the ramp begins, 0 at its end. They take 0.5."""
    tolerance: float = Field(default=0.5, gt=0, le=1)
    """What the regulariser leaves alone: intervals up to 1 / tolerance times as wide as the input's, and ratios of
    active to inactive neurons down to it."""

    meets_inputs: ClassVar[bool] = False
    """Whether ``robust`` computes the margins of the clean inputs where the region is a ball around them."""

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
        return self.attack(model, x, y, self.at(threat, ramp), progress)

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
        met = kappa < 1 and self.meets_inputs and threat.norm == "l2" and has_one_mode(model)
        if (kappa > 0 and not met) or any(isinstance(module, BATCH_NORMS) for module in model.modules()):
            with batch_statistics(model) as statistics:
                natural = F.cross_entropy(model(x), y, reduction="none").mean()
            parts = {"cross_entropy": natural.detach()}
            if kappa == 1:
                return Loss(natural, parts)
        now, graph = self.at(threat, ramp), trace_step(model, x, statistics)
        if not all(head.log for head in graph.heads):
            raise UnsupportedOperator("the loss is taken of logits and has a softmax itself: leave the model's out")
        batch = Batch(model, graph, x, y, now, ramp, progress, x_adv)
        robust = self.robust(batch)
        mean = robust.loss.mean()
        if kappa > 0 and natural is None:
            assert robust.margins is not None
            natural = robust_cross_entropy(robust.margins).mean()
            parts["cross_entropy"] = natural.detach()
        # A term of weight 0 is left out: no forward is made and nothing differentiated for it alone.
        total = mean if natural is None or kappa == 0 else kappa * natural + (1 - kappa) * mean
        parts["robust_cross_entropy"] = mean.detach()
        if weight := self.regularisation * (1 - ramp):
            values = robust.values or interval_values(graph, batch.region)
            extra = weight * interval_regulariser(graph, values, self.tolerance, progress.mean)
            total = total + extra
            parts["regulariser"] = extra.detach()
        return Loss(total, parts, x_adv)

    def present(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> None:
        """The clean batch, whose statistics the bounds share."""
        model(x)

    @abstractmethod
    def robust(self, batch: Batch) -> Robust:
        """The loss on bounds of each example."""

    def at(self, threat: Threat, ramp: float) -> Threat:
        """The threat model at this place of the ramp."""
        return threat.with_eps(ramp * self.radius * threat.eps)

    def weight_of_clean(self, ramp: float) -> float:
        """κ."""
        return self.start_kappa + ramp * (self.kappa - self.start_kappa)

    def ramp(self, progress: Progress) -> float:
        """0 until the warm-up ends, 1 from ``ramp_end`` on, growing between."""
        share = progress.ramp(self.ramp_end, self.warmup)
        return share if self.ramp_shape == "linear" else smoothed(share)


_ONE_MODE = (
    nn.Sequential, nn.Conv2d, nn.Linear, nn.ReLU, nn.LeakyReLU, nn.Flatten, nn.Identity, nn.MaxPool2d, nn.AvgPool2d,
    nn.AdaptiveAvgPool2d, Normalize,
)  # fmt: skip


def has_one_mode(model: nn.Module) -> bool:
    """Whether a network is sure to compute in train mode what it does in eval mode: it is made of torch's own plain
    layers alone."""
    return all(type(module) in _ONE_MODE for module in model.modules())


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


def interval_regulariser(
    graph: Graph, values: dict[int, Interval], tolerance: float, mean: Callable[[Tensor], Tensor] = lambda own: own
) -> Tensor:
    """Tightness and balance of Shi et al. (2021, section 3.2), a scalar.

    Over the inputs of the ReLUs: max(0, τ − E Δ₀ / E Δ_i) / τ for the mean widths Δ; and max(0, τ − r) / τ for two
    ratios r ≤ 1 of active to inactive neurons, of their summed centres and of their share in the variance.

    Args:
        mean: means over a batch that several processes share, from those over the examples at hand.
    """
    read = [node.inputs[0] for node in graph.nodes if isinstance(node.operator, Rectifier)]
    inner = [values[n] for n in read if n in values]
    if not inner:
        return values[0].centre.new_zeros(())
    masks = [(value.lower >= 0, value.upper <= 0) for value in inner]
    first = [values[0].radius.mean()]
    for value, (active, inactive) in zip(inner, masks, strict=True):
        centre = value.centre
        first += [value.radius.mean(), centre.mean(), (centre * active).mean(), -(centre * inactive).mean()]
    width, *of_layers = mean(torch.stack(first)).unbind()
    second = []
    for value, centre, both in zip(inner, of_layers[1::4], masks, strict=True):
        spread = (value.centre - centre).square()
        second += [(spread * mask).mean() for mask in both]
    spreads = mean(torch.stack(second)).unbind()
    terms = [(tolerance - width / own.clamp(min=1e-12)).clamp(min=0) for own in of_layers[::4]]
    pairs = [*zip(of_layers[2::4], of_layers[3::4], strict=True), *zip(spreads[::2], spreads[1::2], strict=True)]
    for active, inactive in pairs:
        ratio = active.clamp(min=1e-12) / inactive.clamp(min=1e-12)
        terms.append((tolerance - torch.minimum(ratio, 1 / ratio)).clamp(min=0))
    return torch.stack(terms).sum() / (tolerance * len(read))
