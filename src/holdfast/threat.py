"""Threat: the norm, the radius and the box of what an adversary may do. A value, used everywhere.

Nothing outside this file asks which norm it is: distance, projection, steepest direction, random
points and interval hull are answered here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema
from torch import Tensor

from holdfast.component import nearest, parse_number
from holdfast.draws import Draws
from holdfast.norms import NORMS, Norm


@dataclasses.dataclass(frozen=True)
class Threat:
    """All inputs x' in [low, high] with ‖x' − x‖ ≤ eps.

    ``eps`` is in input units; images live in [0, 1] unless the box says otherwise, and an infinite
    ``low`` or ``high`` removes that side of the box. Written as text it is ``"linf:8/255"``.

    >>> Threat.parse("l2:36/255") == Threat("l2", 36 / 255)
    True

    Raises:
        ValueError: unknown norm; eps negative or not a number; an empty box.
    """

    norm: str
    eps: float
    low: float = 0.0
    high: float = 1.0
    norms: ClassVar[tuple[str, ...]] = tuple(NORMS)

    def __post_init__(self) -> None:
        if not isinstance(self.norm, str) or self.norm not in NORMS:
            raise ValueError(f"{self.norm!r} is not a norm; {nearest(self.norm, NORMS)}")
        object.__setattr__(self, "eps", parse_number(self.eps))
        if self.eps < 0:
            raise ValueError(f"eps must be ≥ 0, given {self.eps}")
        for side in ("low", "high"):
            value = getattr(self, side)
            infinite = str(value).strip().lower() in ("inf", "-inf", ".inf", "-.inf")
            number = float(str(value).replace(".inf", "inf")) if infinite else parse_number(value)
            object.__setattr__(self, side, number)
        if not self.low < self.high:
            raise ValueError(f"the box [{self.low}, {self.high}] is empty")

    @classmethod
    def parse(cls, value: object) -> Threat:
        """A threat from a threat, ``"norm:eps"``, or ``{norm: ..., eps: ..., low: ..., high: ...}``."""
        if isinstance(value, Threat):
            return value
        if isinstance(value, str):
            norm, separator, eps = value.partition(":")
            if not separator:
                raise ValueError(f"expected norm:eps such as linf:8/255, given {value!r}")
            return cls(norm.strip(), parse_number(eps))
        if isinstance(value, Mapping):
            fields = {field.name for field in dataclasses.fields(cls)}
            for key in value:
                if key not in fields:
                    raise ValueError(f"unknown key {key!r} of a threat; {nearest(key, fields)}")
            if missing := {"norm", "eps"} - set(value):
                raise ValueError(f"a threat needs {' and '.join(sorted(missing))}, given {dict(value)!r}")
            return cls(**value)
        raise ValueError(f"expected norm:eps such as linf:8/255, given {value!r}")

    def __str__(self) -> str:
        pixels = round(self.eps * 255)
        short = f"{pixels}/255" if pixels / 255 == self.eps and len(repr(self.eps)) > 6 else repr(self.eps)
        box = "" if (self.low, self.high) == (0, 1) else f" in [{self.low:g}, {self.high:g}]"
        return f"{self.norm}:{short}{box}"

    def serialise(self) -> str | dict[str, Any]:
        """What ``parse`` reads back: text where the box is [0, 1], a mapping otherwise."""
        if (self.low, self.high) == (0, 1):
            return str(self)
        # JSON has no infinity, so an open side is written as text.
        return {k: str(v) if v in (math.inf, -math.inf) else v for k, v in dataclasses.asdict(self).items()}

    def with_eps(self, eps: float) -> Threat:
        """The same threat at another radius."""
        return dataclasses.replace(self, eps=eps)

    @property
    def _norm(self) -> type[Norm]:
        return NORMS[self.norm]

    @property
    def sparse(self) -> bool:
        """Whether the norm favours few entries: the shortest way changes one, not all."""
        return self.norm in ("l1", "l0")

    @property
    def discrete(self) -> bool:
        """Whether distance counts changed entries: no slopes, no quotients."""
        return self.norm == "l0"

    def distance(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """‖x_adv − x‖ of each example, (N,)."""
        return self._norm.length((x_adv - x).flatten(1))

    def dual_length(self, gradient: Tensor) -> Tensor:
        """The most that a function with this gradient gains per unit of length, (N,)."""
        return self._norm.dual_length(gradient.flatten(1))

    def project(self, x: Tensor, x_adv: Tensor, eps: Tensor | None = None) -> Tensor:
        """x_adv moved to the ball around x, then to the box; (N, ...).

        For l_inf and l_1 this is the nearest feasible point. For l_2 it is feasible (a clip towards a box
        that holds x shortens every coordinate of the difference), but not always the nearest.

        Args:
            eps: another radius for each example, (N,); the threat's own by default.
        """
        delta = (x_adv - x).flatten(1)
        radius = self.eps if eps is None else eps[:, None]  # bounds by example are slow to clamp to
        delta = self._norm.project(delta, radius, partial(self._room, x.flatten(1))).view_as(x)
        return (x + delta).clamp_(self.low, self.high)

    def _room(self, x: Tensor, direction: Tensor) -> Tensor:
        """How far each coordinate can go up, or down where the direction is negative, within the box; where the
        direction is 0, this means nothing."""
        if math.inf in (self.high, -self.low):
            return torch.where(direction > 0, self.high - x, x - self.low).clamp(min=0)
        sign = direction.sign()  # a choice by entries is slow: its branches cannot be foretold
        return torch.maximum((self.high - x) * sign, (self.low - x) * sign).clamp_(min=0)

    def shortest_step(self, x: Tensor, gradient: Tensor, gain: Tensor) -> Tensor:
        """The shortest d within the box with ⟨gradient, d⟩ = gain, (N, ...): the way to a hyperplane.

        Where the box does not reach that far, all that it allows. Exact for l_1, l_2 and l_inf.

        Args:
            gain: (N,), of either sign.
        """
        direction = (gradient * gain.view(-1, *[1] * (x.dim() - 1))).flatten(1).sign()
        room = self._room(x.flatten(1), direction)
        return (direction * self._norm.shortest(gradient.flatten(1).abs(), gain.abs(), room)).view_as(x)

    def largest_noise(self, x: Tensor, generators: Draws | Sequence[torch.Generator]) -> Tensor:
        """Random points as far from each x as the ball allows, moved into the box; (N, ...).

        l_inf: every entry changes by eps up or down; otherwise a Gaussian direction of length eps.
        """
        return self._random(x, generators, self._norm.largest)

    def steepest(self, gradient: Tensor, x_adv: Tensor, share: float = 0.0) -> Tensor:
        """The direction of unit length with the largest inner product with the gradient; (N, ...).

        For l_1 that is a single coordinate: the one of largest slope that the box lets move from x_adv.
        A zero gradient gives a zero direction.

        Args:
            share: for l_1, spread evenly over this share of the coordinates, and one at least; the other norms
                move them all.
        """

        def movable() -> Tensor:
            return torch.where(gradient > 0, x_adv < self.high, x_adv > self.low).flatten(1)

        return self._norm.steepest(gradient.flatten(1), movable, share).view_as(gradient)

    def random_point(self, x: Tensor, generators: Draws | Sequence[torch.Generator]) -> Tensor:
        """A uniform point of the ball around each x, moved into the box; (N, ...).

        Args:
            generators: what the examples draw, or one CPU generator for each of them, which gives another point
                every time: what example i draws depends on nothing else.
        """
        return self._random(x, generators, self._norm.uniform)

    def _random(
        self, x: Tensor, source: Draws | Sequence[torch.Generator], noise: Callable[[Draws, int], Tensor]
    ) -> Tensor:
        if len(source) != len(x):
            raise ValueError(f"{len(x)} examples need as many generators, given {len(source)}")
        draws = source if isinstance(source, Draws) else Draws.by(source)
        delta = noise(draws.to(x.device), x.flatten(1).shape[1]).to(x).view_as(x)
        return (x + self.eps * delta).clamp(self.low, self.high)

    def interval(self, x: Tensor, eps: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The smallest axis-parallel box that holds every feasible point: lower and upper, (N, ...).

        Args:
            eps: another radius for each example, (N,); the threat's own by default.
        """
        radius = x.new_full((len(x),), self.eps) if eps is None else eps
        reach = self._norm.reach(radius).view(-1, *[1] * (x.dim() - 1))
        return (x - reach).clamp(min=self.low), (x + reach).clamp(max=self.high)

    @property
    def is_box(self) -> bool:
        """Whether the threat set is an axis-parallel box."""
        return self.norm == "linf"

    @property
    def order(self) -> float:
        """The p of the norm."""
        return {"linf": math.inf, "l2": 2.0, "l1": 1.0, "l0": 0.0}[self.norm]

    def support(
        self, x: Tensor, direction: Tensor, eps: Tensor | None = None, room: Tensor | None = None
    ) -> Tensor:
        """The most that ⟨direction, x' − x⟩ can be over the threat set, (N,): exact up to rounding, never below,
        and differentiable in the direction.

        Args:
            direction: (N, ...).
            eps: another radius for each example, (N,); the threat's own by default.
            room: how far each coordinate can go in its direction, (N, d); as far as the box by default.
        """
        direction, x = direction.flatten(1), x.flatten(1)
        radius = x.new_full((len(x), 1), self.eps) if eps is None else eps[:, None]
        return self._norm.support(direction.abs(), radius, self._room(x, direction) if room is None else room)

    def euclidean_eps(self, dimensions: int) -> float:
        """The radius of an l_2 ball that holds the ball of radius 1."""
        return self._norm.euclidean_radius(dimensions)

    def covering_eps(self, dimensions: int) -> float:
        """The radius from which the ball around any point of the box holds the whole box; inf without one."""
        return self._norm.box_radius(dimensions, self.high - self.low)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(Threat.serialise)
        )
