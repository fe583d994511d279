"""The worst inputs of a threat set in rational arithmetic, and the search for one that breaks a certificate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from exact import Exact, ExactNetwork, exactly
from torch import Tensor

BITS = 400
"""Binary places of a length that has no rational value."""


@dataclass(frozen=True)
class ExactRegion:
    """All points of the box within eps of x, ends included: numerators over one denominator, (d,) each."""

    norm: str
    x: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    eps: int
    bottom: int

    @classmethod
    def ball(cls, x: Tensor, norm: str, eps: float, low: float, high: float) -> ExactRegion:
        """Of one input (...); an infinite eps means the whole of a finite box."""
        x = x.flatten()
        if math.isinf(eps):
            return cls.between(x, torch.full_like(x, low), torch.full_like(x, high))
        sides = [side if math.isfinite(side) else 0.0 for side in (low, high)]
        numbers = exactly(np.array([eps, *sides, *x.tolist()]))
        (reach, below, above), points = numbers.top[:3], numbers.top[3:]
        lower, upper = points - reach, points + reach
        lower = np.maximum(lower, below) if math.isfinite(low) else lower
        upper = np.minimum(upper, above) if math.isfinite(high) else upper
        return cls(norm, points, lower, upper, reach, numbers.bottom)

    @classmethod
    def between(cls, x: Tensor, lower: Tensor, upper: Tensor) -> ExactRegion:
        """The box with these ends around one input, (...) each."""
        numbers = exactly(torch.stack([x.flatten(), lower.flatten(), upper.flatten()]))
        points, below, above = numbers.top
        return cls("linf", points, below, above, max(0, *(above - below)), numbers.bottom)

    @property
    def centre(self) -> Exact:
        return Exact(self.x, self.bottom)

    @property
    def radius(self) -> float:
        """Of a ball its eps, of a box its largest width."""
        return float(Fraction(self.eps, self.bottom))

    def holds(self, point: Exact) -> bool:
        """Whether a point lies in the set."""
        bottom = math.lcm(self.bottom, point.bottom)
        scale, at = bottom // self.bottom, point.over(bottom)
        inside = bool(((self.lower * scale <= at) & (at <= self.upper * scale)).all())
        return inside and self._fits(at - self.x * scale, self.eps * scale)

    def _fits(self, delta: np.ndarray, eps: int) -> bool:
        size = {"linf": lambda: 0, "l1": lambda: abs(delta).sum(), "l2": lambda: (delta * delta).sum()}[self.norm]()
        return bool(size <= (eps * eps if self.norm == "l2" else eps))

    def worst(self, gradient: np.ndarray) -> Exact:
        """The point of the set at which ⟨gradient, ·⟩ is least (in l_2: within 2^-200 of it)."""
        sign = np.where(gradient > 0, -1, np.where(gradient < 0, 1, 0)).astype(object)
        room = np.where(gradient > 0, self.x - self.lower, np.where(gradient < 0, self.upper - self.x, 0))
        step, places = {"linf": self._whole, "l1": self._largest_first, "l2": self._along}[self.norm](
            abs(gradient), room.astype(object)
        )
        return Exact((self.x << places) + sign * step, self.bottom << places)

    def _whole(self, weight: np.ndarray, room: np.ndarray) -> tuple[np.ndarray, int]:
        return room, 0

    def _largest_first(self, weight: np.ndarray, room: np.ndarray) -> tuple[np.ndarray, int]:
        """The entries of largest weight use up their room."""
        step, left = room * 0, self.eps
        for entry in sorted(range(len(weight)), key=lambda number: -weight[number]):
            step[entry] = min(room[entry], left)
            left -= step[entry]
        return step, 0

    def _along(self, weight: np.ndarray, room: np.ndarray) -> tuple[np.ndarray, int]:
        """Along the weights, entries beyond their room held there and the rest stretched to what is left."""
        weight, space = weight >> max(0, int(max(weight)).bit_length() - BITS // 2), room << BITS
        free = weight > 0
        while free.any():
            spare = self.eps**2 - (np.where(free, 0, np.where(weight > 0, room, 0)) ** 2).sum()
            stretch = math.isqrt((max(0, spare) << 2 * BITS) // (np.where(free, weight, 0) ** 2).sum())
            beyond = free & (weight * stretch > space)
            if not beyond.any():
                return np.where(free, weight * stretch, np.where(weight > 0, space, 0)), BITS
            free = free & ~beyond
        return np.where(weight > 0, space, 0), BITS

    def nearby(self, point: Tensor) -> Exact:
        """A point of the set near to one that rounding may have put outside."""
        given = exactly(point.flatten())
        bottom = math.lcm(self.bottom, given.bottom)
        scale = bottom // self.bottom
        delta = np.clip(given.over(bottom), self.lower * scale, self.upper * scale) - self.x * scale
        eps = self.eps * scale
        if self._fits(delta, eps):
            return Exact(self.x * scale + delta, bottom)
        length = abs(delta).sum() if self.norm == "l1" else math.isqrt((delta * delta).sum()) + 1
        # Towards x by eps / length, rounded down.
        short = abs(delta) * ((eps << BITS) // length) * np.where(delta < 0, -1, 1)
        return Exact((self.x * scale << BITS) + short, bottom << BITS)


def counterexample(
    network: ExactNetwork, region: ExactRegion, y: int, starts: Iterable[Exact] = (), climbs: int = 3
) -> Exact | None:
    """A point of the set where the class is not y alone, or None where none was found.

    From x and every start, for every other class: to the worst point of the affine piece of the network that is
    around, and again from there. For a network of a single piece what is not found is not there.
    """
    for start in (region.centre, *starts):
        margins, gradient = network.margins(start, y)
        if (margins.top <= 0).any():
            return _checked(region, start)
        for place in range(len(margins.top)):
            towards = gradient(place)
            for _ in range(climbs):
                point = region.worst(towards)
                values, slopes = network.margins(point, y)
                if (values.top <= 0).any():
                    return _checked(region, point)
                before, towards = np.sign(towards), slopes(place)
                if (np.sign(towards) == before).all() and region.norm == "linf":
                    break
    return None


def _checked(region: ExactRegion, point: Exact) -> Exact:
    assert region.holds(point), "the oracle left the set"
    return point
