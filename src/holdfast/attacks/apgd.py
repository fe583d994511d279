"""Auto-PGD: ascent with a step size that halves where the progress stalls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from holdfast.attacks.attack import Attack, GradientAttack, Targets
from holdfast.attacks.losses import (
    LogitLoss,
    cross_entropy,
    dlr,
    gap,
    targeted_dlr,
    targeted_gap,
    until_wrong,
    until_wrong_towards,
)
from holdfast.attacks.pgd import likeliest, random_start
from holdfast.search import Ascent, Function, State, StepRule, ascend, per_example, surely_none
from holdfast.threat import Threat

Values = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Adaptive:
    """The steps of APGD for l_inf and l_2 (Croce & Hein, 2020, algorithm 1).

    z = project(x_t + η · steepest(g_t)), x_{t+1} = project(x_t + ¾ (z − x_t) + ¼ (x_t − x_{t−1})). η begins
    at 2 eps. At checkpoints, the first after 22 % of the steps and then ever closer, an example whose value
    rose in at most 75 % of the steps since the last, or whose best has not changed though η has not either,
    halves η and goes back to its best point.
    """

    threat: Threat
    steps: int

    def begin(self, x: Tensor, points: Tensor) -> State:
        number, like = len(points), points.new_zeros(len(points))
        return {
            "previous": points.clone(),
            "best": points.clone(),
            "best_gradient": torch.zeros_like(points),
            "best_value": like - torch.inf,
            "value": like.clone(),
            "eta": like + 2 * self.threat.eps,
            "rises": torch.zeros_like(like),
            "since": torch.zeros_like(like),
            "window": like + max(int(0.22 * self.steps), 1),
            "value_at_check": like.clone(),
            "halved": torch.ones(number, dtype=torch.bool, device=points.device),
        }

    def move(self, state: State, x: Tensor, points: Tensor, value: Tensor, gradient: Tensor, age: Tensor) -> Tensor:
        points, gradient = self.remember(state, points, value, gradient, age)
        eta = per_example(state["eta"], points)
        direct = self.threat.project(x, points + eta * self.threat.steepest(gradient, points))
        share = per_example(torch.where(age > 0, 0.75, 1.0).to(points), points)
        inertia = points - state["previous"]
        state["previous"] = points
        return self.threat.project(x, points + share * (direct - points) + (1 - share) * inertia)

    def remember(
        self, state: State, points: Tensor, value: Tensor, gradient: Tensor, age: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Take in a step, and return where to go on from: the point itself, or the best where η is halved."""
        state["rises"] += (age > 0) & (value > state["value"])
        better = value > state["best_value"]
        _keep(state, better, points, value, gradient)
        state["value"] = value
        state["value_at_check"] = torch.where(age > 0, state["value_at_check"], value)
        state["since"] += age > 0
        check = (age > 0) & (state["since"] >= state["window"])
        if surely_none(check):
            return points, gradient
        oscillates = state["rises"] <= 0.75 * state["window"]
        stuck = ~state["halved"] & (state["value_at_check"] >= state["best_value"])
        halve = check & (oscillates | stuck)
        state["eta"] = torch.where(halve, state["eta"] / 2, state["eta"])
        state["halved"] = torch.where(check, halve, state["halved"])
        state["value_at_check"] = torch.where(check, state["best_value"], state["value_at_check"])
        shrink, least = max(int(0.03 * self.steps), 1), max(int(0.06 * self.steps), 1)
        window = (state["window"] - shrink).clamp(min=least)
        state["window"] = torch.where(check, window, state["window"])
        state["since"] = state["since"].masked_fill(check, 0)
        state["rises"] = state["rises"].masked_fill(check, 0)
        if surely_none(halve):
            return points, gradient
        back = per_example(halve, points)
        return torch.where(back, state["best"], points), torch.where(back, state["best_gradient"], gradient)


@dataclass(frozen=True)
class AdaptiveSparse:
    """The steps of APGD for l_1 (Croce & Hein, 2021): along the signs of the largest slopes only.

    A step of length η spreads evenly over a share of the coordinates and is projected onto ball ∩ box. At
    checkpoints the share becomes two thirds of that of the best perturbation; η goes back to eps where
    that shrank by a twentieth, and otherwise falls by 1.5, to no less than eps / 10. The share begins at a
    fifth in every ball; the original takes it from the point that the last one led to.
    """

    threat: Threat
    steps: int
    share: float = 0.2

    def begin(self, x: Tensor, points: Tensor) -> State:
        like = points.new_zeros(len(points))
        dimensions = points[0].numel() if len(points) else 1
        return {
            "best": points.clone(),
            "best_gradient": torch.zeros_like(points),
            "best_value": like - torch.inf,
            "eta": like + self.threat.eps,
            "share": like + self.share,
            "sparsity": like + dimensions,
            "since": torch.zeros_like(like),
        }

    def move(self, state: State, x: Tensor, points: Tensor, value: Tensor, gradient: Tensor, age: Tensor) -> Tensor:
        better = value > state["best_value"]
        _keep(state, better, points, value, gradient)
        state["since"] += age > 0
        check = (age > 0) & (state["since"] >= max(int(0.04 * self.steps), 1))
        if not surely_none(check):
            sparsity = (state["best"] != x).flatten(1).sum(1).to(points)
            sparser = check & (sparsity < 0.95 * state["sparsity"])
            eps = self.threat.eps
            slower = (state["eta"] / 1.5).clamp(min=eps / 10)
            state["eta"] = torch.where(
                check, torch.where(sparser, torch.full_like(slower, eps), slower), state["eta"]
            )
            state["share"] = torch.where(check, sparsity / x[0].numel() / 1.5, state["share"])
            state["sparsity"] = torch.where(check, sparsity, state["sparsity"])
            state["since"] = state["since"].masked_fill(check, 0)
            back = per_example(sparser, points)
            points = torch.where(back, state["best"], points)
            gradient = torch.where(back, state["best_gradient"], gradient)
        flat = gradient.flatten(1)
        count = (state["share"] * flat.shape[1]).long().clamp(1, flat.shape[1])
        threshold = flat.abs().sort(dim=1, descending=True).values.gather(1, count[:, None] - 1)
        signs = flat.sign() * (flat.abs() >= threshold)
        step = state["eta"][:, None] * signs / signs.abs().sum(1, keepdim=True).clamp(min=1)
        return self.threat.project(x, points + step.view_as(points))


def _keep(state: State, better: Tensor, points: Tensor, value: Tensor, gradient: Tensor) -> None:
    """Remember the points, their values and gradients where they are better."""
    there = per_example(better, points)
    state["best"] = torch.where(there, points, state["best"])
    state["best_gradient"] = torch.where(there, gradient, state["best_gradient"])
    state["best_value"] = torch.where(better, value, state["best_value"])


def adaptive_rule(threat: Threat, steps: int) -> StepRule:
    """APGD's steps in the threat's norm."""
    return AdaptiveSparse(threat, steps) if threat.sparse else Adaptive(threat, steps)


class _APGD(GradientAttack):
    """What the two kinds of APGD share."""

    thorough: ClassVar[bool] = True
    steps: PositiveInt = 100
    """Gradient steps of each attempt."""

    def ascend(self, function: Function, targets: Targets, threat: Threat, *, restarts: int, salt: int) -> Ascent:
        if not threat.sparse:
            start = random_start(targets, threat, salt)
            rule = adaptive_rule(threat, self.steps)
            return ascend(
                function,
                targets.x,
                rule,
                steps=self.steps,
                start=start,
                restarts=restarts,
                batch_size=targets.batch_size,
            )
        return self._shrinking(function, targets, threat, restarts, salt)

    def _shrinking(self, function: Function, targets: Targets, threat: Threat, restarts: int, salt: int) -> Ascent:
        """For l_1: in balls of three and two times eps first, each stage from where the last one led."""
        result = Ascent.before(targets.x)
        for restart in range(restarts):
            rows = result.unfinished
            x = targets.x[rows]
            points = random_start(targets, threat.with_eps(3 * threat.eps), salt)(rows, restart)
            for factor, share in ((3, 0.3), (2, 0.3), (1, 0.4)):
                ball = threat.with_eps(factor * threat.eps)
                found = ascend(
                    partial(_on_rows, function, rows, final=factor == 1),
                    x,
                    AdaptiveSparse(ball, max(int(share * self.steps), 1)),
                    steps=max(int(share * self.steps), 1),
                    start=partial(_from, ball.project(x, points)),
                    batch_size=targets.batch_size,
                )
                points = found.x
                result.absorb(rows, found, restart, keep_better=factor == 1)
        return result


def _on_rows(function: Function, rows: Tensor, points: Tensor, chosen: Tensor, *, final: bool) -> Values:
    """A function on some of its examples; a point outside of the ball is no success before the final stage."""
    values, finished = function(points, rows[chosen])
    return values, finished if final else None


def _from(points: Tensor, rows: Tensor, restart: int) -> Tensor:
    return points[rows]


class APGD(_APGD, name="apgd"):
    """Auto-PGD (Croce & Hein, 2020; for l_1, 2021): no step size to choose."""

    loss: Literal["cross-entropy", "dlr"] = "cross-entropy"
    """What is ascended; with fewer than three classes the margin stands for ``dlr``."""
    restarts: PositiveInt = 1
    """Independent starts; an example stops at its first success."""

    @property
    def title(self) -> str:
        return f"APGD-{'CE' if self.loss == 'cross-entropy' else 'DLR'}-{self.steps}"

    def perturb(self, model: nn.Module, targets: Targets, threat: Threat) -> Ascent:
        loss: LogitLoss = cross_entropy
        if self.loss == "dlr":
            loss = dlr if targets.logits.shape[1] > 2 else gap
        function = until_wrong(model, targets.y, loss, self.samples)
        return self.ascend(function, targets, threat, restarts=self.restarts, salt=0)


class APGDTargeted(_APGD, name="apgd-t"):
    """Auto-PGD on the targeted DLR loss, one likely class after the other (Croce & Hein, 2020)."""

    targets: PositiveInt = 9
    """The so many likeliest other classes. With fewer than four classes the margin stands for the DLR."""

    @property
    def title(self) -> str:
        return f"APGD-T-{self.steps} × {self.targets}"

    @property
    def brief(self) -> Attack:
        return self.model_copy(update={"targets": min(self.targets, 3), "steps": min(self.steps, 30)})

    def perturb(self, model: nn.Module, targets: Targets, threat: Threat) -> Ascent:
        loss: Callable[..., Tensor] = targeted_dlr if targets.logits.shape[1] > 3 else targeted_gap
        result = Ascent.before(targets.x)
        for number, target in enumerate(likeliest(targets, self.targets)):
            rows = result.unfinished
            rows = rows[target[rows] >= 0]
            part = targets.take(rows)
            function = until_wrong_towards(model, part.y, target[rows], loss, self.samples)
            result.absorb(rows, self.ascend(function, part, threat, restarts=1, salt=1 + number), number)
        return result

    def describe(self, restart: int, step: int) -> str:
        return f"{self.name} target {restart} step {step}"
