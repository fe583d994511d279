"""The short list of operator kinds that every network is normalised to, and the graph they make.

An affine operator needs its forward map and |W|; what each kind does in an abstract domain is that
domain's affair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor

Map = Callable[[Tensor], Tensor]


class UnsupportedOperator(ValueError):
    """The network holds an operator without a bound rule; the message names its place and the remedy."""


@dataclass(frozen=True)
class Operator:
    """One kind of operator; what it does in an abstract domain is that domain's affair."""


@dataclass(frozen=True)
class Affine(Operator):
    """x ↦ W x + b."""

    forward: Map
    """W x + b."""
    absolute: Map
    """|W| r, for r ≥ 0."""


@dataclass(frozen=True)
class Linear(Affine):
    """A dense layer; its weight is known, so that a specification can be merged into it."""

    weight: Tensor
    bias: Tensor | None
    forward: Map = field(init=False)
    absolute: Map = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "forward", lambda x: F.linear(x, self.weight, self.bias))
        object.__setattr__(self, "absolute", lambda radius: F.linear(radius, self.weight.abs()))


@dataclass(frozen=True)
class Monotone(Operator):
    """A function that increases in every input coordinate: ReLU, max-pooling, sigmoid."""

    function: Map


@dataclass(frozen=True)
class Sum(Operator):
    """The first input plus (or minus) the second."""

    sign: int = 1


@dataclass(frozen=True)
class Concatenate(Operator):
    """The inputs side by side along a dimension."""

    dim: int


@dataclass(frozen=True)
class Node:
    """An operator, which earlier values it reads (0 is the network's input), and where it stands."""

    operator: Operator
    inputs: tuple[int, ...]
    path: str


@dataclass(frozen=True)
class Graph:
    """Node i computes value i + 1 from values before it; the last value is the logits."""

    nodes: list[Node]


def positive(function: Map) -> Affine:
    """A linear map with non-negative weights: pooling by average, reshaping, permuting."""
    return Affine(function, function)
