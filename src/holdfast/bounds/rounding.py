"""What rounding adds: the error terms of floating-point arithmetic, in one place.

A bound is a computed number less what rounding can have added to it. With unit roundoff u and γ_n = n u / (1 − n
u), a sum of n products errs by at most γ_n times the sum of their sizes, in any order of summation (Higham,
*Accuracy and Stability of Numerical Algorithms*, 2002, ch. 3); where products underflow, by the smallest normal
number each beside. That is so of products of matrices and of direct convolutions, not of Winograd's or Fourier's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Arithmetic = Literal["real", "float32"]
"""What a certificate speaks of: ``real``, the network as a function of real numbers with these weights, on all real
inputs of the set; ``float32``, beside that what torch computes of them in single precision, in any order of
summation.
"""

KERNEL = 16
"""Roundings that a kernel of a smooth function (exp, tanh, erf) may be off by, and one step of ours beside it."""

STEPS = 8
"""Roundings beside a sum's own: how an entry of W or b was made, products with a share, the last additions."""


@dataclass(frozen=True)
class Rounding:
    """An arithmetic whose errors are accounted for."""

    unit: float
    """Unit roundoff of what computes the bound, and beside it of what computes the network, if that is meant."""
    tiny: float
    """What underflow may lose in one operation."""
    network: bool = False
    """Whether the network's own rounding is meant too."""

    @classmethod
    def of(cls, dtype: torch.dtype, arithmetic: Arithmetic = "real") -> Rounding:
        """That of bounds computed in this type, which speak of such a network."""
        info, network = torch.finfo(dtype), arithmetic == "float32"
        single = torch.finfo(torch.float32)
        unit = info.eps / 2 + (single.eps / 2 if network else 0.0)
        return cls(unit, max(info.tiny, single.tiny if network else 0.0), network)

    def gamma(self, n: float) -> float:
        """γ_n; inf where n roundings may lose a tenth, so that squares of it are negligible wherever it is not."""
        return n * self.unit / (1 - n * self.unit) if n * self.unit < 0.1 else math.inf

    def up(self, size: Tensor, n: int = 1) -> Tensor:
        """At least what n roundings on the way to a size ≥ 0 may have made smaller."""
        return size * (1 + self.gamma(2 * n + 2)) + self.tiny

    def below(self, value: Tensor) -> Tensor:
        """At most what a sum or difference of two numbers, of either sign, was rounded from."""
        return torch.sub(value, value.abs(), alpha=self._step)  # where it underflows, a sum is exact

    def above(self, value: Tensor) -> Tensor:
        """At least that."""
        return torch.add(value, value.abs(), alpha=self._step)

    @cached_property
    def _step(self) -> float:
        return self.gamma(4)


class Bound(NamedTuple):
    """A lower bound, and what was taken from it on account of rounding; of one shape."""

    lower: Tensor
    slack: Tensor | None = None
    """What was taken in the end; on the way there rounding may have cost some times as much. None where it was not
    accounted for."""

    @property
    def hope(self) -> Tensor:
        """What a computation of more precision may still reach: where that is too little, it need not be made."""
        return self.lower if self.slack is None else self.lower + REACH * self.slack

    @classmethod
    def joined(cls, parts: Sequence[Bound], dim: int) -> Bound:
        """Those of several examples, or functions, in order."""
        slacks = [part.slack for part in parts if part.slack is not None]
        return cls(torch.cat([part.lower for part in parts], dim), torch.cat(slacks, dim) if slacks else None)

    def through(self, function: Callable[[Tensor], Tensor]) -> Bound:
        """What it says of a rising function, which takes care of its own rounding."""
        lower = function(self.lower)
        return Bound(lower, None if self.slack is None else (function(self.hope) - lower) / REACH)


REACH = 16
"""Times its slack, a bound that lies lower is not asked again in float64: a matter of cost, not of soundness."""


class Cost(NamedTuple):
    """What a step of a backward pass may err by: ⟨|a|, share⟩ + floor for coefficients a of its result."""

    share: Tensor
    """(N, entries of the result)."""
    floor: Tensor
    """What underflow loses whatever a is, (N,)."""

    def plus(self, other: Cost, factor: float) -> Cost:
        """With another step, the coefficients of which are at most ``factor`` times as large."""
        return Cost(torch.add(self.share, other.share, alpha=factor), self.floor + other.floor)

    def take(self, rows: Tensor) -> Cost:
        """Those of some examples."""
        return Cost(self.share[rows], self.floor[rows])

    def of(self, a: Tensor) -> Tensor:
        """For coefficients (N, S, ...), (N, S)."""
        return dots(a.abs(), self.share) + self.floor[:, None]


def dots(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ for (N, S, ...) and (N, ...), (N, S)."""
    a, b = a.flatten(2), b.flatten(1)
    if a.shape[1] == 1:  # a product of matrices is slow here, above all backward
        return (a * b[:, None]).sum(2)
    return torch.bmm(a, b[:, :, None])[:, :, 0]
