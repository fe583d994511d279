"""Projected gradient descent, untargeted, targeted, and towards several classes in turn."""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from holdfast.attacks.attack import Attack, GradientAttack, Targets
from holdfast.attacks.losses import (
    LogitLoss,
    LossName,
    asked,
    cross_entropy,
    divergence,
    dlr,
    gap,
    gap_among,
    targeted_gap,
    until_wrong,
    until_wrong_towards,
)
from holdfast.search import Ascent, Decay, Function, Start, Steepest, ascend, per_example
from holdfast.threat import Threat

TargetName = Literal["next", "least-likely", "random"]
Schedule = Literal["constant", "cosine", "geometric"]
SHARE = 0.01
"""Of the entries, what a step in l_1 moves by default."""
FIELDS = 4
"""Along each side of an image: those that change as one in a coarse start."""


class _Projected(GradientAttack):
    """What the attacks by projected steepest ascent share."""

    thorough: ClassVar[bool] = True
    steps: PositiveInt = 100
    """Gradient steps of each attempt; the point after the last one is tested as well."""
    restarts: PositiveInt = 1
    """Independent starts; an example stops at its first success."""
    schedule: Schedule = "constant"
    """How the length of a step goes on with t = step / steps: constant, (1 + cos πt) / 2 of the first, or
    100^−t of it."""
    step_size: PositiveFloat | None = None
    """Length of the first step in units of eps; by default 1 where it falls, and 2.5 / steps, but at most 1, where
    it is constant."""
    random_start: bool = True
    """Start at a uniform point of the threat set; from the input itself otherwise."""
    coarse: bool = False
    """Let a random start lie as far from an image as the threat allows, each of 4 × 4 fields of it changed as one;
    what are no images start at a uniform point all the same."""
    momentum: float = Field(default=0.0, ge=0)
    """Weight of past gradients, each over its mean absolute value (Dong et al., 2018); 0 for none."""
    share: float | None = Field(default=None, gt=0, le=1)
    """For l_1: share of the entries that a step moves, each as far, those of largest slope first (Tramèr & Boneh,
    2019); a hundredth by default. The other norms have their own steepest step and take none."""

    def ascend(self, function: Function, targets: Targets, threat: Threat, salt: int | None = None) -> Ascent:
        if self.share is not None and threat.norm != "l1":
            raise ValueError(f"share={self.share} is for steps in l1; leave it out for {threat.norm}")
        return ascend(
            function,
            targets.x,
            Steepest(threat, threat.eps * self._first_step, self.momentum, self.share or SHARE, self._decay),
            steps=self.steps,
            start=self._start(targets, threat, salt),
            restarts=self.restarts,
            batch_size=targets.batch_size,
        )

    def _start(self, targets: Targets, threat: Threat, salt: int | None) -> Start:
        if not self.random_start:
            return lambda rows, _: targets.x[rows]
        return (coarse_start if self.coarse and targets.x.dim() == 4 else random_start)(targets, threat, salt)

    @property
    def _first_step(self) -> float:
        return self.step_size or (min(1.0, 2.5 / self.steps) if self.schedule == "constant" else 1.0)

    @property
    def _decay(self) -> Decay | None:
        if self.schedule == "cosine":
            return lambda age: (1 + (math.pi / self.steps * age).cos()) / 2
        if self.schedule == "geometric":
            return lambda age: 100.0 ** (-age / self.steps)
        return None


def random_start(targets: Targets, threat: Threat, salt: int | None = None) -> Start:
    """A uniform point of the threat set, another one for every restart and salt."""

    def start(rows: Tensor, restart: int) -> Tensor:
        which = (0, restart) if salt is None else (0, restart, salt)
        return threat.random_point(targets.x[rows], targets.draws(*which, rows=rows))

    return start


def coarse_start(targets: Targets, threat: Threat, salt: int | None = None) -> Start:
    """A point at distance eps from each image (N, C, H, W), moved into the box, where the change is the same over
    each of 4 × 4 fields of a channel; another one for every restart and salt.

    Networks whose gradients mislead close to the input are broken from far away: Square, too, begins with large
    areas at the ends of their range.
    """
    unit = Threat(threat.norm, 1.0, -math.inf, math.inf)

    def start(rows: Tensor, restart: int) -> Tensor:
        which, x = (6, restart) if salt is None else (6, restart, salt), targets.x[rows]
        fields = unit.largest_noise(x.new_zeros(*x.shape[:2], FIELDS, FIELDS), targets.draws(*which, rows=rows))
        whole = F.interpolate(fields, size=x.shape[2:])
        length = unit.distance(torch.zeros_like(whole), whole)
        return threat.project(x, x + whole * per_example(threat.eps / length, x))

    return start


class PGD(_Projected, name="pgd"):
    """Projected steepest ascent of a loss, best point kept (Madry et al., 2018)."""

    loss: LossName = "cross-entropy"
    """``dlr`` does not hang on the scale of the logits, ``margin`` is z_j − z_y, ``kl`` the divergence from the
    answer to the clean input."""
    target: TargetName | None = None
    """Descend the cross-entropy of another class instead: the next one (label + 1), the least likely, or one
    drawn at random. A success is any wrong answer all the same."""

    @property
    def title(self) -> str:
        return f"PGD-{self.steps}" + (f" × {self.restarts}" if self.restarts > 1 else "")

    def perturb(self, model: nn.Module, targets: Targets, threat: Threat) -> Ascent:
        if self.target is not None:
            target = choose_target(self.target, targets)
            function = until_wrong_towards(
                model, targets.y, target, lambda z, y, t: -cross_entropy(z, t), self.samples
            )
        elif self.loss == "kl":
            function = _until_wrong_from(model, targets, self.samples)
        else:
            losses: dict[str, LogitLoss] = {"cross-entropy": cross_entropy, "dlr": dlr, "margin": gap}
            loss = self.loss if self.loss != "dlr" or targets.logits.shape[1] > 2 else "margin"
            function = until_wrong(model, targets.y, losses[loss], self.samples)
            if loss == "margin" and targets.open is not None:
                function = until_wrong_towards(model, targets.y, targets.open, gap_among, self.samples)
        return self.ascend(function, targets, threat)


def choose_target(name: TargetName, targets: Targets) -> Tensor:
    """A class other than the label for each example, (N,); none that is masked."""
    classes = targets.logits.shape[1]
    if name == "least-likely":
        known = targets.logits.masked_fill(targets.logits == -torch.inf, torch.inf)
        return known.scatter(1, targets.y[:, None], torch.inf).argmin(1)
    others = (targets.y[:, None] + torch.arange(1, classes, device=targets.y.device)) % classes
    masked = targets.logits.gather(1, others) == -torch.inf
    others = others.gather(1, masked.byte().argsort(dim=1, stable=True))
    if name == "next":
        return others[:, 0]
    drawn = targets.draws(1).below(classes - 1, 1).squeeze(1) % (~masked).sum(1).clamp(min=1)
    return others.gather(1, drawn[:, None]).squeeze(1)


def _until_wrong_from(model: nn.Module, targets: Targets, samples: int) -> Function:
    def function(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return asked(model, points, targets.y[rows], partial(divergence, targets.logits[rows]), samples)

    return function


class MultiTargeted(_Projected, name="multi-targeted"):
    """PGD on the margin z_t − z_y for one target class after the other (Gowal et al., 2019).

    The targets come in the order of the clean logits, those left out that a certificate excludes; an example stops
    at its first success.
    """

    targets: PositiveInt | None = None
    """Try the so many likeliest other classes; all by default."""

    @property
    def title(self) -> str:
        return f"MultiTargeted-{self.steps}"

    @property
    def brief(self) -> Attack:
        return self.model_copy(update={"targets": min(self.targets or 3, 3), "steps": min(self.steps, 30)})

    def perturb(self, model: nn.Module, targets: Targets, threat: Threat) -> Ascent:
        result = Ascent.before(targets.x)
        for number, target in enumerate(likeliest(targets, self.targets)):
            rows = result.unfinished
            rows = rows[target[rows] >= 0]
            part = targets.take(rows)
            function = until_wrong_towards(model, part.y, target[rows], targeted_gap, self.samples)
            result.absorb(rows, self.ascend(function, part, threat, salt=number), number)
        return result

    def describe(self, restart: int, step: int) -> str:
        return f"{self.name} target {restart} step {step}"


def likeliest(targets: Targets, count: int | None = None) -> list[Tensor]:
    """The most likely wrong class of each example (N,), the second most likely, and so on; −1 where no further one
    is open."""
    closed = F.one_hot(targets.y, targets.logits.shape[1]).bool()
    if targets.open is not None:
        closed |= ~targets.open
    order = targets.logits.masked_fill(closed, -torch.inf).argsort(dim=1, descending=True)
    order = order.masked_fill(closed.gather(1, order), -1)[:, : targets.logits.shape[1] - 1]
    return list(order[:, :count].unbind(1))


class Noise(Attack, name="noise"):
    """Random perturbations as large as the threat allows: the baseline that an attack must beat.

    l_inf: x + eps · sign of a standard normal; otherwise a Gaussian direction of length eps in the norm;
    moved into the box.
    """

    samples: PositiveInt = 1
    """Draws per example; it stops at its first success."""
    sees: ClassVar[Literal["gradients", "answers"]] = "answers"

    def perturb(self, model: nn.Module, targets: Targets, threat: Threat) -> Ascent:
        return ascend(
            until_wrong(model, targets.y, gap),
            targets.x,
            Steepest(threat, 0.0),
            steps=0,
            start=partial(self._start, targets, threat),
            restarts=self.samples,
            batch_size=targets.batch_size,
        )

    @staticmethod
    def _start(targets: Targets, threat: Threat, rows: Tensor, restart: int) -> Tensor:
        return threat.largest_noise(targets.x[rows], targets.draws(2, restart, rows=rows))
