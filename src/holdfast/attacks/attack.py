"""Attack: what every attack takes and returns."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from holdfast.component import Component
from holdfast.draws import Draws
from holdfast.fold import InBfloat16, folded
from holdfast.inference import (
    answered,
    check_inputs,
    check_logits,
    door,
    frozen_eval,
    plain_arithmetic,
    predict,
)
from holdfast.search import Ascent
from holdfast.threat import Threat


@dataclass(frozen=True)
class AttackResult:
    """What an attack did to each of N examples."""

    x_adv: Tensor
    """The adversarial example, or the strongest point where none was found; the input itself where the
    model was wrong already. (N, ...), inside the threat set, but for a minimum-norm attack, whose adversarial
    example may lie beyond eps."""
    success: Tensor
    """Whether the model is wrong at x_adv, inside the threat set, (N,) bool; an already wrong example counts."""
    distance: Tensor
    """‖x_adv − x‖ in the threat's norm, (N,); 0 for an already wrong example. A minimum-norm attack that
    finds nothing reports inf."""
    forwards: Tensor
    """Forward passes spent on the example, (N,) int64, the clean one among them."""
    backwards: Tensor
    """Backward passes spent on the example, (N,) int64."""
    origin: np.ndarray
    """How x_adv was found, (N,) text such as ``apgd-t target 3 step 17``; empty where nothing was."""
    odd: Tensor | None = None
    """Where some gradient on the attack's way was NaN or inf, so that it went on with what was left of it; what
    stood for all that was tried without gradients, too. (N,) bool."""

    @property
    def adversarial_distance(self) -> Tensor:
        """‖x_adv − x‖ where the model is wrong at x_adv, even beyond eps; inf elsewhere. (N,)"""
        found = torch.tensor([bool(text) for text in self.origin], dtype=torch.bool, device=self.success.device)
        return torch.where(self.success | found, self.distance, torch.inf)


class Targets(NamedTuple):
    """The examples under attack, which the model gets right."""

    x: Tensor
    """(N, ...), in the threat's box."""
    y: Tensor
    """(N,) int64."""
    logits: Tensor
    """What the model answers on them, (N, K), of the type of x; −inf for classes that it masks."""
    indices: Tensor
    """Their numbers in the data set, (N,): with the seed they determine every draw."""
    seed: int
    batch_size: int
    """At most so many in a forward pass."""
    open: Tensor | None = None
    """Classes that the model may answer with, as far as certificates and masks tell, the label among them, (N, K)
    bool; all of them where it is None."""

    def draws(self, *salt: int, rows: Tensor | None = None) -> Draws:
        """What they, or some of them, draw; another salt gives unrelated numbers."""
        return Draws.of(self.seed, self.indices if rows is None else self.indices[rows], *salt)

    def take(self, rows: Tensor) -> Targets:
        """Some of them."""
        return self._replace(
            x=self.x[rows],
            y=self.y[rows],
            logits=self.logits[rows],
            indices=self.indices[rows],
            open=None if self.open is None else self.open[rows],
        )


TRIES = 200
"""Queries of an example whose gradients are no numbers."""


class Attack(Component, family="attacks"):
    """Searches the threat set around each input for one that the model gets wrong."""

    precision: Literal["float32", "bf16"] = "float32"
    """Of the attack's own passes; with ``bf16`` every success is confirmed in the model's own precision."""
    minimum_norm: ClassVar[bool] = False
    """Whether it looks for the nearest adversarial example, beyond eps if need be."""
    sees: ClassVar[Literal["gradients", "answers"]] = "gradients"
    """What of the model it looks at."""
    thorough: ClassVar[bool] = False
    """Whether it follows gradients far enough that its failure says something of the model."""
    folds: ClassVar[bool] = True
    """Whether it attacks a copy with BatchNorm folded away."""

    @property
    def heeds_certificates(self) -> bool:
        """Whether an evaluation spares it what is certified: examples, and classes of an example."""
        return True

    @door
    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        *,
        seed: int = 0,
        indices: Sequence[int] | Tensor | None = None,
        batch_size: int = 256,
        open_targets: Tensor | None = None,
    ) -> AttackResult:
        """Attack every example; the model is left exactly as it was.

        Args:
            model: any module from (N, ...) inputs to (N, K) logits; attacked in eval mode.
            x: inputs in the threat's box, (N, ...), floating.
            y: labels, (N,) integers in 0..K−1.
            seed: what example i draws depends on (seed, indices[i]) only.
            indices: the examples' numbers in their data set; 0..N−1 by default.
            batch_size: at most so many examples in a forward pass.
            open_targets: classes that no certificate excludes on the threat set, (N, K) bool: an attack that takes
                them one by one leaves out the others. Of an example without any, all are taken.

        Raises:
            ValueError: inputs or labels that make no sense (see ``check_inputs``).
            FloatingPointError: the model answers with NaN or inf.
        """
        y = check_inputs(x, y, threat)
        numbers = torch.arange(len(x)) if indices is None else torch.as_tensor(indices)
        numbers = numbers.to(x.device)
        x = x.detach().contiguous()
        with frozen_eval(model):
            right = torch.zeros_like(y, dtype=torch.bool)
            logits = torch.empty(0, 0)
            if len(x):
                with plain_arithmetic(x.device):
                    logits = predict(model, x, batch_size)
                check_logits(logits, y, masks=True)
                right = logits.argmax(1) == y
                if logits.dtype != x.dtype:
                    model, logits = _InTypeOfInputs(model), in_type(logits, x.dtype)
            standing = right.nonzero().squeeze(1)
            found, blindly = Ascent.before(x[:0]), {}
            if len(standing):
                open_classes = None if open_targets is None else with_own(open_targets.to(x.device), y)
                if (masked := logits == -torch.inf).any():
                    allowed = ~masked if open_classes is None else open_classes & ~masked
                    open_classes = with_own(allowed, y)
                targets = Targets(x, y, logits, numbers, seed, batch_size, open_classes).take(standing)
                found = self._confirmed(model, targets, threat)
                blindly = self._without_gradients(model, targets, threat, found)
        x_adv, success = x.clone(), torch.ones_like(y, dtype=torch.bool)
        forwards = torch.ones_like(y, dtype=torch.int64)
        backwards = torch.zeros_like(forwards)
        odd = torch.zeros_like(success)
        x_adv[standing], success[standing], odd[standing] = found.x, found.finished, found.odd
        forwards[standing] += found.forwards
        backwards[standing] += found.backwards
        distance = threat.distance(x, x_adv)
        origin = np.full(len(x), "", dtype=object)
        places = zip(
            standing.tolist(), found.finished.tolist(), found.restart.tolist(), found.step.tolist(), strict=True
        )
        for number, (row, finished, restart, step) in enumerate(places):
            origin[row] = blindly.get(number, self).describe(restart, step) if finished else ""
        if self.minimum_norm:
            distance = torch.where(success, distance, torch.inf)
            success = success & (distance <= threat.eps)
        return AttackResult(x_adv, success, distance, forwards, backwards, origin, odd)

    def _confirmed(self, model: nn.Module, targets: Targets, threat: Threat) -> Ascent:
        """The attack on a cheaper copy in whatever arithmetic is fast, each success confirmed on the model in plain
        one; what is not, attacked there."""
        copy = folded(model, targets.x[:16]) if self.folds else model
        if self.precision == "bf16":
            copy = InBfloat16(copy)
        found = self.attempt(copy, targets, threat)
        with plain_arithmetic(targets.x.device):
            again = self._refuted(model, targets, found, torch.arange(len(targets.y), device=targets.y.device))
            if len(again):
                found.finished[again] = False
                found.absorb(again, self.attempt(model, targets.take(again), threat))
                found.finished[self._refuted(model, targets, found, again)] = False
        return found

    def _refuted(self, model: nn.Module, targets: Targets, found: Ascent, rows: Tensor) -> Tensor:
        """Which of these rows were successes that the model, asked anew, does not make."""
        rows = rows[found.finished[rows]]
        votes = torch.zeros_like(rows)
        for _ in range(self.passes if len(rows) else 0):
            votes += predict(model, found.x[rows], targets.batch_size).argmax(1) != targets.y[rows]
        found.forwards[rows] += self.passes
        return rows[2 * votes <= self.passes]

    @property
    def passes(self) -> int:
        """Forward passes that decide whether the model is wrong at a point: more than half of them must be."""
        return 1

    def attempt(self, model: nn.Module, targets: Targets, threat: Threat) -> Ascent:
        """``perturb``, with its passes as the model sees them."""
        return self.perturb(model, targets, threat)

    def _without_gradients(
        self, model: nn.Module, targets: Targets, threat: Threat, found: Ascent
    ) -> dict[int, Attack]:
        """Try by answers alone what stands for all that an attack found with gradients that were no numbers, in
        place; by what each of the examples fell that fell so."""
        standing = ~found.finished | (threat.distance(targets.x, found.x) > threat.eps)
        rows = (found.odd & standing).nonzero().squeeze(1)
        if not len(rows) or threat.discrete or not threat.eps:
            return {}
        images = targets.x.dim() == 4
        blind = self.parse({"name": "square", "queries": TRIES} if images else {"name": "noise", "samples": TRIES})
        tried = blind._confirmed(model, targets.take(rows), threat)
        found.absorb(rows, tried, keep_better=False)
        return dict.fromkeys(rows[tried.finished].tolist(), blind)

    @property
    def brief(self) -> Attack:
        """What stands for it where it would have to run many times, as at the radii of a curve: itself, or where it
        takes thousands of passes something cheaper."""
        return self

    @abstractmethod
    def perturb(self, model: nn.Module, targets: Targets, threat: Threat) -> Ascent:
        """Attack examples that a frozen model in eval mode gets right; finished means wrong."""

    def describe(self, restart: int, step: int) -> str:
        """An attempt and a step in words."""
        return f"{self.name} restart {restart} step {step}"

    def found_blindly(self, origin: str) -> bool:
        """Whether it, or the part of it that this origin names, sees answers only."""
        part = self.registry.get(origin.partition(" ")[0], self)
        return bool(part.sees == "answers")


def with_own(open_targets: Tensor, y: Tensor) -> Tensor:
    """The classes of each example with its own, (N, K); all of them where no other is open."""
    own = torch.zeros_like(open_targets).scatter(1, y[:, None], True)
    return own | open_targets | ~(open_targets & ~own).any(1, keepdim=True)


class GradientAttack(Attack):
    """Follows the gradient at points that it asks about by ``losses.asked``."""

    samples: PositiveInt = 1
    """Forward passes at each point, for models that answer at random: losses, and so gradients, are their means
    (EOT, Athalye et al., 2018), and wrong is what more than half of them get wrong, in a second trial as well."""

    @property
    def passes(self) -> int:
        return self.samples

    def attempt(self, model: nn.Module, targets: Targets, threat: Threat) -> Ascent:
        found = self.perturb(model, targets, threat)
        found.forwards.mul_(self.samples)
        found.backwards.mul_(self.samples)
        return found


class MinimumNormAttack(Attack):
    """Looks for the nearest adversarial example in the threat's norm and box; what is within eps is a success."""

    minimum_norm: ClassVar[bool] = True

    def perturb(self, model: nn.Module, targets: Targets, threat: Threat) -> Ascent:
        model, result = _Finite(model), Ascent.before(targets.x)
        for rows in torch.arange(len(targets.x), device=targets.x.device).split(targets.batch_size):
            nearest = Nearest(targets.x[rows], threat)
            self.minimise(model, targets.take(rows), threat, nearest)
            found = nearest.ascent
            result.absorb(rows, found)
        return result

    @abstractmethod
    def minimise(self, model: nn.Module, targets: Targets, threat: Threat, nearest: Nearest) -> None:
        """Offer ``nearest`` every point that is evaluated."""


class _Finite(nn.Module):
    """A model that may not answer with NaN or inf: that would pass for a failed attack."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        require_answers(logits)
        return logits


def require_answers(logits: Tensor) -> None:
    """Refuse what would pass for a failed attack.

    Raises:
        FloatingPointError: some logits are NaN or inf.
    """
    if not answered(logits).all():
        raise FloatingPointError("the model's logits are NaN or inf at a point of the box")


class _InTypeOfInputs(nn.Module):
    """A model whose logits are of the type of its inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return in_type(self.model(x), x.dtype)


def in_type(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits in another type with the same largest, for what asks about differences: of a finer type those from
    the largest."""
    if torch.finfo(logits.dtype).bits > torch.finfo(dtype).bits:
        logits = logits - logits.detach().amax(1, keepdim=True)
    return logits.to(dtype)


class Nearest:
    """The nearest adversarial example of each of a batch so far, and the passes it took."""

    def __init__(self, x: Tensor, threat: Threat) -> None:
        self.x, self.threat = x, threat
        self.best = Ascent.before(x)
        self.distance = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)

    def offer(self, points: Tensor, wrong: Tensor, step: int, restart: int = 0) -> Tensor:
        """Keep points (n, ...) where they are adversarial (n,) and nearer; their distances."""
        points = points.detach()
        distance = self.threat.distance(self.x, points)
        better = wrong & (distance < self.distance)
        self.best.x[better], self.distance[better] = points[better], distance[better]
        self.best.step[better], self.best.restart[better] = step, restart
        return distance

    def count(self, forwards: int, backwards: int) -> None:
        """Passes spent on every example."""
        self.best.forwards.add_(forwards)
        self.best.backwards.add_(backwards)

    @property
    def ascent(self) -> Ascent:
        found = torch.isfinite(self.distance)
        self.best.finished.copy_(found)
        self.best.value.copy_(torch.where(found, -self.distance, -torch.inf))
        return self.best
