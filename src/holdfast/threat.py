"""Threat: the norm, the radius and the box of what an adversary may do. A value, used everywhere.

Nothing outside this file asks which norm it is: distance, projection, steepest direction, random
points and interval hull are answered here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema
from torch import Tensor

from holdfast.component import nearest, parse_number


class _Linf:
    @staticmethod
    def length(delta: Tensor) -> Tensor:
        return delta.abs().amax(1)

    @staticmethod
    def project(delta: Tensor, eps: float) -> Tensor:
        return delta.clamp(-eps, eps)

    @staticmethod
    def steepest(gradient: Tensor, movable: Tensor) -> Tensor:
        return gradient.sign()

    @staticmethod
    def fill_uniform(row: Tensor, generator: torch.Generator) -> None:
        row.uniform_(-1, 1, generator=generator)

    @staticmethod
    def box_radius(dimensions: int) -> float:
        return 1.0


class _L2:
    @staticmethod
    def length(delta: Tensor) -> Tensor:
        return delta.norm(dim=1)

    @staticmethod
    def project(delta: Tensor, eps: float) -> Tensor:
        length = delta.norm(dim=1, keepdim=True)
        return torch.where(length > eps, delta * (eps / length), delta)

    @staticmethod
    def steepest(gradient: Tensor, movable: Tensor) -> Tensor:
        # Scaled by its largest entry first, so that the squares of tiny gradients do not underflow.
        largest = gradient.abs().amax(1, keepdim=True)
        scaled = gradient / largest.where(largest > 0, torch.ones_like(largest))
        length = scaled.norm(dim=1, keepdim=True)
        return scaled / length.where(length > 0, torch.ones_like(length))

    @staticmethod
    def fill_uniform(row: Tensor, generator: torch.Generator) -> None:
        row.normal_(generator=generator)
        radius = torch.rand((), generator=generator).item() ** (1 / row.numel())
        row.mul_(radius / row.norm())

    @staticmethod
    def box_radius(dimensions: int) -> float:
        return math.sqrt(dimensions)


class _L1:
    @staticmethod
    def length(delta: Tensor) -> Tensor:
        return delta.abs().sum(1)

    @staticmethod
    def project(delta: Tensor, eps: float) -> Tensor:
        """Soft-thresholding at the level that leaves length eps (Duchi et al., 2008)."""
        magnitude = delta.abs()
        ordered = magnitude.sort(dim=1, descending=True).values
        excess = ordered.cumsum(1) - eps
        count = torch.arange(1, delta.shape[1] + 1, device=delta.device)
        last = (ordered * count > excess).sum(1, keepdim=True).clamp(min=1)
        level = excess.gather(1, last - 1) / last
        shrunk = delta.sign() * (magnitude - level).clamp(min=0)
        return torch.where(magnitude.sum(1, keepdim=True) > eps, shrunk, delta)

    @staticmethod
    def steepest(gradient: Tensor, movable: Tensor) -> Tensor:
        magnitude = gradient.abs() * movable
        largest = magnitude.argmax(1, keepdim=True)
        step = gradient.gather(1, largest).sign() * (magnitude.gather(1, largest) > 0)
        return torch.zeros_like(gradient).scatter(1, largest, step)

    @staticmethod
    def fill_uniform(row: Tensor, generator: torch.Generator) -> None:
        # d exponential variables over the sum of d + 1 of them are uniform in the positive simplex.
        spare = torch.empty(1).exponential_(generator=generator).item()
        sign = torch.randint(0, 2, row.shape, generator=generator) * 2 - 1
        row.exponential_(generator=generator)
        row.mul_(sign / (row.sum() + spare))

    @staticmethod
    def box_radius(dimensions: int) -> float:
        return float(dimensions)


_NORMS: dict[str, type[_Linf] | type[_L2] | type[_L1]] = {"linf": _Linf, "l2": _L2, "l1": _L1}


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
    norms: ClassVar[tuple[str, ...]] = tuple(_NORMS)

    def __post_init__(self) -> None:
        if not isinstance(self.norm, str) or self.norm not in _NORMS:
            raise ValueError(f"{self.norm!r} is not a norm; {nearest(self.norm, _NORMS)}")
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
    def _norm(self) -> type[_Linf] | type[_L2] | type[_L1]:
        return _NORMS[self.norm]

    def distance(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """‖x_adv − x‖ of each example, (N,)."""
        return self._norm.length((x_adv - x).flatten(1))

    def project(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """x_adv moved to the ball around x, then to the box; (N, ...).

        For l_inf this is the nearest feasible point. For l_2 and l_1 it is feasible (a clip towards a
        box that holds x shortens every coordinate of the difference), but not always the nearest.
        """
        delta = self._norm.project((x_adv - x).flatten(1), self.eps).view_as(x)
        return (x + delta).clamp(self.low, self.high)

    def steepest(self, gradient: Tensor, x_adv: Tensor) -> Tensor:
        """The direction of unit length with the largest inner product with the gradient; (N, ...).

        For l_1 that is a single coordinate: the one of largest slope that the box lets move from x_adv.
        A zero gradient gives a zero direction.
        """
        movable = torch.where(gradient > 0, x_adv < self.high, x_adv > self.low)
        return self._norm.steepest(gradient.flatten(1), movable.flatten(1)).view_as(gradient)

    def random_point(self, x: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """A uniform point of the ball around each x, moved into the box; (N, ...).

        Args:
            generators: one CPU generator per example, so that what example i draws depends on nothing else.
        """
        if len(generators) != len(x):
            raise ValueError(f"{len(x)} examples need as many generators, given {len(generators)}")
        noise = torch.empty(len(x), x[0].numel())
        for row, generator in zip(noise, generators, strict=True):
            self._norm.fill_uniform(row, generator)
        return (x + self.eps * noise.to(x).view_as(x)).clamp(self.low, self.high)

    def interval(self, x: Tensor, eps: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The smallest axis-parallel box that holds every feasible point: lower and upper, (N, ...).

        Args:
            eps: another radius for each example, (N,); the threat's own by default.
        """
        reach = self.eps if eps is None else eps.view(-1, *[1] * (x.dim() - 1))
        return (x - reach).clamp(min=self.low), (x + reach).clamp(max=self.high)

    def covering_eps(self, dimensions: int) -> float:
        """The radius from which the ball around any point of the box holds the whole box; inf without one."""
        return (self.high - self.low) * self._norm.box_radius(dimensions)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(Threat.serialise)
        )
