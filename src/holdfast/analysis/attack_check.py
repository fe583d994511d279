"""Is an attack any good here: how often it finds adversarial examples that are there by construction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from holdfast.draws import Draws
from holdfast.inference import check_inputs, frozen_eval
from holdfast.models.features import features
from holdfast.threat import Threat

On = Literal["features", "logits"]
CLOSENESS = 0.9
"""Where, from the highest of the inner points, 0, to the point that is made adversarial, 1, the classes part."""
RIDGE = 0.1
"""Of the features' mean variance, what is added to every variance."""
CANDIDATES = 8
"""Points of the sphere of which the one that stands out most is made adversarial."""
SHARP = 100
"""Times the rounding of a read-out that its classes must be apart."""
SALT = 67
"""Of what is drawn here."""


class Outcome(Protocol):
    """What is looked at of an attack's result."""

    @property
    def success(self) -> Tensor:
        """Wrong inside the threat set, (N,) bool."""


Search = Callable[..., Outcome]
"""An attack: (model, x, y, threat, seed=..., batch_size=...) → its result."""
Draw = Callable[[Tensor, Draws], Tensor]
"""(x (n, ...), what they draw) → a point of the ball around each."""


@dataclass(frozen=True)
class AttackCheck:
    """Of N images, each with an adversarial example within its ball where one could be put there."""

    made: Tensor
    """Whether one could, (N,) bool: not where the features do not tell any point of the sphere from inner ones."""
    found: Tensor
    """Whether the attack found it, or another, (N,) bool."""
    at_random: Tensor
    """Whether one of the random points of the ball was one, (N,) bool."""
    on: On
    """What the linear read-out reads."""

    @property
    def rate(self) -> float:
        """Share of the images at which the attack found one; NaN where none could be put anywhere."""
        return self._share(self.found)

    @property
    def random_rate(self) -> float:
        """Share of the images at which a random point was one; NaN likewise."""
        return self._share(self.at_random)

    def _share(self, images: Tensor) -> float:
        return images[self.made].double().mean().item() if self.made.any() else float("nan")


def attack_check(
    model: nn.Module,
    x: Tensor,
    threat: Threat,
    attack: Search,
    *,
    inner: int = 64,
    draws: int = 200,
    seed: int = 0,
    batch_size: int = 256,
) -> AttackCheck:
    """The binarisation test of an attack on a model (Zimmermann et al., 2022).

    Around each image the head gives way to a linear read-out of the penultimate features with two classes: the
    image and random points of its ball are of one, one point of the sphere is of the other, so there is an
    adversarial example in the ball. An attack that follows the features' gradient finds one nearly everywhere.
    Where it does not, that it fails on the model itself says little: the gradient is hidden, or the attack weak.

    The read-out is wᵀ(φ(x') − φ(x)) > t, with w = (Σ + ρ I)⁻¹ (φ(x_adv) − φ(x)), Σ the inner points' scatter and ρ
    a tenth of its mean variance; t is nine tenths of the way from their largest value to that of x_adv. A model
    whose head no linear layer makes is read at its logits.

    Args:
        model: any module from inputs to logits; measured in eval mode and left as it was.
        x: inputs in the threat's box, (N, ...).
        attack: one of ``holdfast.attacks``, or whatever is called like one.
        inner: random points of each ball that keep the image's class.
        draws: points of each ball that random search tries, half of them on its sphere.
        seed: what example i draws depends on it and on i only.

    Raises:
        ValueError: inputs that make no sense, eps = 0, or a model that answers at random.
    """
    problems = Problems(model, x, threat, inner=inner, seed=seed, batch_size=batch_size)
    return problems.check(attack, problems.at_random(draws))


class Problems:
    """Two classes on a model's features around each image, with an adversarial example in the ball."""

    def __init__(
        self, model: nn.Module, x: Tensor, threat: Threat, *, inner: int = 64, seed: int = 0, batch_size: int = 256
    ) -> None:
        """See ``attack_check``."""
        check_inputs(x, torch.zeros(len(x), dtype=torch.int64, device=x.device), threat)
        if threat.eps <= 0 or threat.discrete or not len(x) or inner < 1:
            raise ValueError(
                "expected eps > 0 in a norm other than l0, whose balls have no random points, and some images and "
                f"inner points, given {threat}, {len(x)} and {inner}"
            )
        self.x, self.threat, self.seed, self.batch_size = x, threat, seed, batch_size
        self.made = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.x_adv = x.clone()
        """What is adversarial by construction, (N, ...); the image where nothing is."""
        self.on = _readable(model, x[:1])
        self._model = model
        self._parts = [(rows, self._readout(rows, inner)) for rows in _apart(x, threat)]

    @torch.no_grad()
    def _readout(self, rows: Tensor, inner: int) -> Readout:
        """The classifier around some images whose balls do not meet."""
        x, threat = self.x[rows], self.threat
        readout = Readout(self._model, self.on, threat, x)
        with frozen_eval(self._model):
            origin = readout.read(x)
            if not torch.allclose(origin, readout.read(x), rtol=1e-4, atol=1e-5, equal_nan=True):
                raise ValueError("the model answers at random: no point is adversarial by construction")
            edge = torch.cat(list(self._points(rows, CANDIDATES, threat.largest_noise, 0)))
            inside = self._features(readout, self._points(rows, inner, threat.random_point, 1)) - origin
            outside = self._features(readout, [edge]) - origin
            scatter, step = inside.transpose(0, 1), outside.permute(1, 2, 0)  # (n, inner, d), (n, d, candidates)
            weight = _discriminant(scatter, step)
            top = (scatter @ weight).amax(1).clamp(min=0)
            value = (weight * step).sum(1)
            gain = ((value - top) / value).nan_to_num(-1.0)
            best = gain.argmax(1)
            each = torch.arange(len(rows), device=x.device)
            weight, top, value = weight[each, :, best], top[each, best], value[each, best]
            threshold = top + CLOSENESS * (value - top)
            scale = torch.where(threshold > 0, threshold, 1)  # the image's value becomes −1
            readout.define(origin, weight / scale[:, None], threshold / scale)
            point = edge[best, each]
            rounding = (weight.abs() * (origin.abs() + outside[best, each].abs())).sum(1)
            apart = value - top > SHARP * torch.finfo(origin.dtype).eps * rounding
            made = apart & readout(point).argmax(1).bool() & ~readout(x).argmax(1).bool()
        self.made[rows] = made
        self.x_adv[rows[made]] = point[made]
        return readout

    def _points(self, rows: Tensor, count: int, draw: Draw, salt: int) -> Iterator[Tensor]:
        """So many points for each of these images, in pieces (some, n, ...) that fit into a forward pass."""
        x, some = self.x[rows], max(self.batch_size // len(rows), 1)
        for first in range(0, count, some):
            numbers = range(first, min(first + some, count))
            yield torch.stack([draw(x, Draws.of(self.seed, rows, SALT, salt, k)) for k in numbers])

    def _features(self, readout: Readout, pieces: Iterator[Tensor] | list[Tensor]) -> Tensor:
        """(count, n, d)."""
        return torch.cat([readout.read(piece.flatten(0, 1)).unflatten(0, piece.shape[:2]) for piece in pieces])

    @torch.no_grad()
    def at_random(self, draws: int) -> Tensor:
        """Whether one of so many random points is adversarial, half of them on the sphere, (N,) bool."""
        found = torch.zeros_like(self.made)
        with frozen_eval(self._model):
            for rows, readout in self._parts:
                for count, draw, salt in (
                    (draws // 2, self.threat.largest_noise, 2),
                    (draws - draws // 2, self.threat.random_point, 3),
                ):
                    for piece in self._points(rows, count, draw, salt):
                        wrong = readout(piece.flatten(0, 1)).argmax(1).bool().unflatten(0, piece.shape[:2])
                        found[rows] |= wrong.any(0)
        return found & self.made

    def check(self, attack: Search, at_random: Tensor) -> AttackCheck:
        """What an attack finds of it, beside what random search did."""
        found = torch.zeros_like(self.made)
        for rows, readout in self._parts:
            rows = rows[self.made[rows]]
            if len(rows):
                inner = torch.zeros_like(rows)
                how = {"seed": self.seed, "indices": rows.cpu(), "batch_size": self.batch_size}
                found[rows] = attack(readout, self.x[rows], inner, self.threat, **how).success
        return AttackCheck(self.made, found, at_random, self.on)


class Readout(nn.Module):
    """Two classes around each of G centres by a linear function of the features: logits (N, 2), 0 at a centre.

    A point is judged as one of the nearest centre; within balls that do not meet that is the ball's own.
    """

    origin: Tensor
    weight: Tensor
    threshold: Tensor

    def __init__(self, model: nn.Module, on: On, threat: Threat, centres: Tensor) -> None:
        super().__init__()
        self.model, self.on, self.order, self.centres = model, on, threat.order, centres.flatten(1)

    def define(self, origin: Tensor, weight: Tensor, threshold: Tensor) -> None:
        """Label 1 where weight · (features − origin) > threshold, of each centre: (G, d), (G, d), (G,)."""
        self.origin, self.weight, self.threshold = origin, weight, threshold

    def read(self, x: Tensor) -> Tensor:
        """The features, (N, d)."""
        logits: Tensor = features(self.model)(x).features if self.on == "features" else self.model(x)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            away = torch.cdist(
                x.flatten(1), self.centres.to(x), self.order, compute_mode="donot_use_mm_for_euclid_dist"
            )
            own = away.argmin(1)
        value = ((self.read(x) - self.origin[own]) * self.weight[own]).sum(1) - self.threshold[own]
        return torch.stack([-value, value], 1) / 2


@torch.no_grad()
def _readable(model: nn.Module, x: Tensor) -> On:
    """Whether a linear layer makes the logits."""
    with frozen_eval(model):
        try:
            features(model)(x)
        except ValueError:
            return "logits"
    return "features"


def _discriminant(scatter: Tensor, step: Tensor) -> Tensor:
    """(SᵀS + ρ I)⁻¹ · step up to a factor, (n, d, k), by way of the smaller matrix S Sᵀ.

    Args:
        scatter: S, (n, m, d).
        step: (n, d, k).
    """
    ridge = RIDGE * scatter.square().sum((1, 2)) / scatter.shape[2]
    ridge = ridge.clamp(min=torch.finfo(scatter.dtype).tiny)
    gram = scatter @ scatter.mT + torch.diag_embed(ridge[:, None].expand(-1, scatter.shape[1]))
    weight: Tensor = step - scatter.mT @ torch.linalg.solve(gram, scatter @ step)
    return weight


def _apart(x: Tensor, threat: Threat) -> list[Tensor]:
    """The images in groups, each of images whose balls do not meet."""
    groups: list[list[int]] = []
    for row in range(len(x)):
        for group in groups:
            if (threat.distance(x[row].expand_as(x[group]), x[group]) > 2 * threat.eps).all():
                group.append(row)
                break
        else:
            groups.append([row])
    return [torch.tensor(group, device=x.device) for group in groups]
