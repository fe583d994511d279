"""Certified training between an attack and a bound: SABR, TAPS, STAPS, MTL-IBP, CC-IBP, Exp-IBP."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from holdfast.bounds import Graph, Interval, Rectifier, UnsupportedOperator, margin_rows, robust_cross_entropy
from holdfast.bounds.differences import differences
from holdfast.bounds.interval import rule
from holdfast.bounds.linear import intervals
from holdfast.bounds.operators import run
from holdfast.bounds.region import Region, region_of
from holdfast.bounds.specification import interval_margins_at, interval_values
from holdfast.component import PositiveNumber
from holdfast.objectives.adversarial import PGDTraining
from holdfast.objectives.certified import Batch, CertifiedTraining, Robust
from holdfast.objectives.objective import Progress
from holdfast.search import climb
from holdfast.threat import Threat


class _Attacking(PGDTraining, CertifiedTraining):
    """What they share: an attack on the network in eval mode."""

    steps: PositiveInt = 8
    """Steps of the inner PGD."""
    step_size: PositiveFloat = 0.25
    """Length of a step in units of the radius that is searched."""

    attack_radius: PositiveNumber | None = None
    """Radius of the attack, relative to the threat model's: 2.1 for 2.1 eps. By default it is the radius that is
    trained for, less what the method keeps for a box around the point."""

    def attack(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> Tensor | None:
        share = self.searched if self.attack_radius is None else self.attack_radius / self.radius
        searched = threat.with_eps(share * threat.eps)
        if searched.eps == 0:
            return None
        return self.last_of_pgd(model, x, y, searched, progress.random_points(x, searched))

    @property
    def searched(self) -> float:
        """The radius of the attack relative to the one that is trained for, unless it is set."""
        return 1.0


class _SmallBox(_Attacking):
    """A box around an adversarial example, in place of the threat set."""

    share: float = Field(default=0.4, gt=0, le=1)
    """Width of the box relative to the threat set; at 1 it is all of it, and nothing is attacked."""

    @property
    def searched(self) -> float:
        return 1 - self.share

    def box(self, batch: Batch) -> Region:
        """The part of the threat set."""
        return region_of(batch.attacked, batch.threat.with_eps(self.share * batch.threat.eps))


class SABR(_SmallBox, name="sabr"):
    """Interval bounds of a small threat set around an adversarial example (Müller et al., 2023).

    Its radius is τ = share · eps, its centre the PGD point of the ball of radius eps − τ.
    """

    shrinkage: float = Field(default=1.0, gt=0, le=1)
    """Behind every ReLU the box's radius is multiplied by it, so that what is trained on is no bound any more;
    published is 0.8 on CIFAR-10 at 2/255."""

    def robust(self, batch: Batch) -> Robust:
        region, graph = self.box(batch), shrinking(batch.graph, self.shrinkage)
        values = interval_values(graph, region)
        return Robust(robust_cross_entropy(interval_margins_at(graph, region, values, batch.y).lower), values)


@dataclass(frozen=True)
class Shrinking(Rectifier):
    """A rectifier whose intervals come out narrower than they are: a training's device, and no bound."""

    share: float = 1.0


@rule.register
def _(operator: Shrinking, value: Interval) -> Interval:
    image = rule.dispatch(Rectifier)(operator, value)
    return Interval(image.centre, operator.share * image.radius)


def shrinking(graph: Graph, share: float) -> Graph:
    """The graph with every rectifier's interval narrowed to a share of its width."""
    if share == 1:
        return graph
    nodes = [
        replace(node, operator=Shrinking(**vars(node.operator), share=share))
        if isinstance(node.operator, Rectifier)
        else node
        for node in graph.nodes
    ]
    return replace(graph, nodes=nodes)


class MTLIBP(_Attacking, name="mtl-ibp"):
    """(1 − α) · loss under attack + α · loss on interval bounds (De Palma et al., 2024)."""

    alpha: float = Field(default=0.1, ge=0, le=1)
    """Weight of the bound."""

    def robust(self, batch: Batch) -> Robust:
        attacked, bound, values = both_margins(batch)
        losses = robust_cross_entropy(attacked), robust_cross_entropy(bound)
        return Robust((1 - self.alpha) * losses[0] + self.alpha * losses[1], values)


class CCIBP(_Attacking, name="cc-ibp"):
    """Cross-entropy of (1 − α) · margins under attack + α · their interval bounds (De Palma et al., 2024)."""

    alpha: float = Field(default=0.1, ge=0, le=1)
    """Weight of the bound."""

    def robust(self, batch: Batch) -> Robust:
        attacked, bound, values = both_margins(batch)
        return Robust(robust_cross_entropy((1 - self.alpha) * attacked + self.alpha * bound), values)


class ExpIBP(_Attacking, name="exp-ibp"):
    """(loss under attack)^(1 − α) · (loss on interval bounds)^α (De Palma et al., 2024)."""

    alpha: float = Field(default=0.5, ge=0, le=1)
    """Weight of the bound."""

    def robust(self, batch: Batch) -> Robust:
        attacked, bound, values = both_margins(batch)
        tiny = torch.finfo(bound.dtype).tiny
        logarithms = [robust_cross_entropy(margins).clamp(min=tiny).log() for margins in (attacked, bound)]
        return Robust(((1 - self.alpha) * logarithms[0] + self.alpha * logarithms[1]).exp(), values)


def both_margins(batch: Batch) -> tuple[Tensor, Tensor, dict[int, Interval]]:
    """The margins at the PGD point and their interval bounds, (N, K−1) each, on one graph; and its intervals."""
    values = interval_values(batch.graph, batch.region)
    bound = interval_margins_at(batch.graph, batch.region, values, batch.y).lower
    return margins_at(batch.y, run(batch.graph, batch.attacked)), bound, values


def margins_at(y: Tensor, logits: Tensor) -> Tensor:
    """z_y − z_j for the classes j ≠ y ascending, (N, K−1)."""
    return differences(logits, y)


class TAPS(_SmallBox, name="taps"):
    """Intervals through the first layers, then an attack on the last ones (Mao et al., 2023).

    The cross-entropy of the worst margins found within the box of their input, times that of the interval bound.

    Each other class is attacked by itself. The gradient enters the box through the entries that the attack drove
    to its ends: ∂p/∂u = max(0, 1 − (u − p) / (c (u − l))) and likewise for l, with c = 0.5.
    """

    share: float = Field(default=1.0, gt=0, le=1)
    """Width of the box relative to the threat set; at 1 it is all of it, and nothing is attacked."""
    classifier: PositiveInt = 1
    """So many ReLUs belong to the part that is attacked and not bounded."""
    emphasis: float = Field(default=5.0, gt=0)
    """Gradient weight α of the attacked factor: 2 α / (1 + α) against 2 / (1 + α)."""

    def robust(self, batch: Batch) -> Robust:
        graph, y = batch.graph, batch.y
        region = self.box(batch)
        values = intervals(graph, region)
        bounded = robust_cross_entropy(interval_margins_at(graph, region, values, y).lower)
        cut = cut_before(graph, self.classifier)
        latent = values[cut]
        rows = margin_rows(y, graph.shape(len(graph.nodes))[0], bounded.dtype)
        points = connected(self._worst_points(graph, cut, latent, rows), latent)  # (N, K−1, ...)
        logits = run(graph, points.flatten(0, 1), cut).view(*rows.shape[:2], -1)
        found = robust_cross_entropy((rows * logits).sum(2))
        weight = 2 * self.emphasis / (1 + self.emphasis)
        # The value of the product, with the gradients of its two factors weighed.
        loss = weight * found * bounded.detach() + (2 - weight) * found.detach() * bounded
        return Robust(loss - (found * bounded).detach(), values)

    def _worst_points(self, graph: Graph, cut: int, latent: Interval, rows: Tensor) -> Tensor:
        """For each other class a point of the latent box where it comes close to the label, (N, K−1, ...)."""
        classes = rows.shape[1]
        lower, width = (t.detach().repeat_interleave(classes, 0) for t in (latent.lower, 2 * latent.radius))
        flat = rows.flatten(0, 1)

        def function(shares: Tensor, _: Tensor) -> tuple[Tensor, None]:
            return -(flat * run(graph, lower + shares * width, cut)).sum(1), None

        # In shares of the box the latent box is the unit box, and the ascent the one of every attack.
        middle = torch.full_like(lower, 0.5)
        unit = Threat("linf", 0.5)
        shares = climb(function, middle, unit, steps=self.steps, step_size=self.step_size, start=middle)
        return (lower + shares * width).view(len(rows), classes, *lower.shape[1:])


class STAPS(TAPS, name="staps"):
    """``taps`` from SABR's box (Mao et al., 2023)."""

    share: float = Field(default=0.4, gt=0, le=1)
    """Width of the box relative to the threat set; at 1 it is all of it, and nothing is attacked."""


def cut_before(graph: Graph, rectifiers: int) -> int:
    """The value from which all later values follow, and after which so many ReLUs stand."""
    count = sum(isinstance(node.operator, Rectifier) for node in graph.nodes)
    for value in range(len(graph.nodes), -1, -1):
        after = graph.nodes[value:]
        alone = all(source >= value for node in after for source in node.inputs)
        if alone and sum(isinstance(node.operator, Rectifier) for node in after) >= min(rectifiers, count):
            return value
    raise UnsupportedOperator("the network has no value that all later ones follow from")


def connected(points: Tensor, box: Interval, share: float = 0.5) -> Tensor:
    """The points (N, S, ...) with gradients towards the ends of the box that they lie near."""
    lower, upper = box.lower[:, None], box.upper[:, None]
    with torch.no_grad():
        width = (share * (upper - lower)).clamp(min=1e-12)
        to_lower = (1 - (points - lower) / width).clamp(0, 1)
        to_upper = (1 - (upper - points) / width).clamp(0, 1)
    return points + to_lower * (lower - lower.detach()) + to_upper * (upper - upper.detach())
