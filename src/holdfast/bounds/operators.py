"""The short list of operator kinds that every network is normalised to, and the graph they make.

An affine operator needs its forward map, |W| and the adjoint; every domain derives its rule from these. What
a kind does in an abstract domain is that domain's affair.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Map = Callable[[Tensor], Tensor]
Value = TypeVar("Value")
Shape = tuple[int, ...]
"""Of one example, without the batch dimension."""


class UnsupportedOperator(ValueError):
    """The network holds an operator without a bound rule; the message names its place and the remedy."""


class OutsideDomain(UnsupportedOperator):
    """An operator is not defined everywhere on the interval of its input."""


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
    entrywise: bool = field(default=False, kw_only=True)
    """Whether each entry of the result reads one entry of the input: scaling, shifting, reshaping."""
    norm: Callable[[], float] | None = field(default=None, kw_only=True)
    """At least the operator norm of W in l_2, where how W is made tells it."""
    summands: int | None = field(default=None, kw_only=True)
    """At most so many entries are read for one of W x, and of Wᵀ a; by default all there are. An entry's own part
    of W, and of b, is made by a few roundings."""
    offsets: Map | None = field(default=None, kw_only=True)
    """An input ↦ the sizes of what b is the sum of, (1, ...), where that may be more than |b|."""

    @property
    def moves(self) -> bool:
        """Whether it only moves entries, which rounds nothing."""
        return self.entrywise and self.absolute is self.forward

    def fan_in(self, shape: Shape) -> int:
        """At most so many products are summed for an entry of W x."""
        return 1 if self.entrywise else self.summands or math.prod(shape)

    def fan_out(self, shape: Shape) -> int:
        """At most so many products are summed for an entry of Wᵀ a, a of this shape."""
        return 1 if self.entrywise else self.summands or math.prod(shape)

    def bias_size(self, like: Tensor, shape: Shape) -> Tensor:
        """At least |b| and the sizes of all that b was summed from, (1, ...)."""
        return self.bias(like, shape).abs() if self.offsets is None else self.offsets(like.new_zeros(1, *shape))

    def adjoint(self, coefficients: Tensor, shape: Shape) -> Tensor:
        """Wᵀ a for a (M, ...), where an input has this shape; (M, *shape)."""
        return transposed(self.forward, coefficients, shape)

    def bias(self, like: Tensor, shape: Shape) -> Tensor:
        """b, (1, ...)."""
        return self.forward(like.new_zeros(1, *shape))

    def row_lengths(self, like: Tensor, shape: Shape, order: float) -> Tensor:
        """At least the length of each row of W in this norm, (1, ...): here its l_1 norm, the largest of all."""
        return self.absolute(like.new_ones(1, *shape))

    def gain(self, like: Tensor, shape: Shape, order: float) -> Tensor:
        """At least the operator norm of W, from l_1 to l_1 or l_2 to l_2 (order 1 or 2): scalar.

        The norm from l_1 to l_1 is the largest column sum of |W|; by Schur's test the square of that from
        l_2 to l_2 is at most the largest row sum times the largest column sum.
        """
        rows = self.absolute(like.new_ones(1, *shape))
        columns = transposed(self.absolute, torch.ones_like(rows), shape).amax()
        return columns if order == 1 else rows.amax().sqrt() * columns.sqrt()


@dataclass(frozen=True)
class Linear(Affine):
    """A dense layer; its weight is known, so that a specification can be merged into it."""

    weight: Tensor
    constant: Tensor | None
    forward: Map = field(init=False)
    absolute: Map = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "forward", lambda x: F.linear(x, self.weight, self.constant))
        object.__setattr__(self, "absolute", lambda radius: F.linear(radius, self.weight.abs()))

    def fan_in(self, shape: Shape) -> int:
        return self.weight.shape[1]

    def fan_out(self, shape: Shape) -> int:
        return self.weight.shape[0]

    def bias_size(self, like: Tensor, shape: Shape) -> Tensor:
        return like.new_zeros(1) if self.constant is None else self.constant.abs()[None]

    def adjoint(self, coefficients: Tensor, shape: Shape) -> Tensor:
        return coefficients @ self.weight

    def row_lengths(self, like: Tensor, shape: Shape, order: float) -> Tensor:
        return lengths(self.weight, order).expand(1, *shape[:-1], -1)


@dataclass(frozen=True)
class Convolution(Affine):
    """A convolution with zero padding, in one or two dimensions."""

    weight: Tensor
    constant: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    forward: Map = field(init=False)
    absolute: Map = field(init=False)

    def __post_init__(self) -> None:
        function: Any = F.conv1d if len(self.stride) == 1 else F.conv2d
        rest = self.stride, self.padding, self.dilation, self.groups
        object.__setattr__(self, "forward", lambda x: function(x, self.weight, self.constant, *rest))
        object.__setattr__(self, "absolute", lambda radius: function(radius, self.weight.abs(), None, *rest))

    def fan_in(self, shape: Shape) -> int:
        return self.weight[0].numel()

    def fan_out(self, shape: Shape) -> int:
        return self.weight[:, 0].numel()

    def bias_size(self, like: Tensor, shape: Shape) -> Tensor:
        constant = like.new_zeros(1) if self.constant is None else self.constant.abs()
        return constant.view(1, -1, *[1] * len(self.stride))

    def adjoint(self, coefficients: Tensor, shape: Shape) -> Tensor:
        function: Any = F.conv_transpose1d if len(self.stride) == 1 else F.conv_transpose2d
        sizes = zip(
            shape[1:],
            coefficients.shape[2:],
            self.weight.shape[2:],
            self.stride,
            self.padding,
            self.dilation,
            strict=True,
        )
        missing = [wide - ((n - 1) * s - 2 * p + d * (k - 1) + 1) for wide, n, k, s, p, d in sizes]
        rest = self.stride, self.padding, missing, self.groups, self.dilation
        result: Tensor = function(coefficients, self.weight, None, *rest)
        return result

    def row_lengths(self, like: Tensor, shape: Shape, order: float) -> Tensor:
        rows = lengths(self.weight.flatten(1), order)  # at the border some are shorter
        return rows.view(1, -1, *[1] * len(self.stride))


def lengths(vectors: Tensor, order: float = 2.0) -> Tensor:
    """Norms over the last dimension, whose squares neither vanish nor overflow."""
    scale = vectors.abs().amax(-1, keepdim=True).detach()
    unit = vectors / torch.where(scale > 0, scale, 1)
    return scale[..., 0] * torch.linalg.vector_norm(unit, order, dim=-1)


def transposed(linear: Map, coefficients: Tensor, shape: Shape) -> Tensor:
    """The adjoint of a linear (or affine) map of (M, *shape), applied to a (M, ...); differentiable."""
    if torch.is_inference_mode_enabled():
        raise ValueError("bounds differentiate on the way: use torch.no_grad() in place of torch.inference_mode()")
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        zero = coefficients.new_zeros(len(coefficients), *shape).requires_grad_(True)
        return torch.autograd.grad(linear(zero), zero, coefficients, create_graph=keep)[0]


@contextlib.contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Makes tensors that adjoints by differentiation can use, also for somebody who asks in inference mode."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


@dataclass(frozen=True)
class Monotone(Operator):
    """A function that increases in every input coordinate."""

    function: Map

    @property
    def rounds(self) -> bool:
        """Whether its values are rounded; a largest entry is not."""
        return True


@dataclass(frozen=True)
class Elementwise(Operator):
    """A function f of each entry by itself: sigmoid, GELU, clamp."""

    function: Map
    kinks: tuple[float, ...]
    """Where the slope of f jumps."""
    curvature: float
    """The largest |f''| elsewhere: 0 for straight pieces. Linear bounds are sound only if it is."""
    steepest: float
    """The largest |f'|. Bounds by balls are sound only if it is."""
    turns: tuple[float, ...] = ()
    """Where f passes from falling to rising or back; none for a monotone function."""

    @property
    def rounds(self) -> bool:
        """Whether its values are rounded; those of max, min and |·| are not."""
        return True


@dataclass(frozen=True)
class Rectifier(Elementwise):
    """max(v, leak · v) with 0 ≤ leak ≤ 1: ReLU and LeakyReLU."""

    leak: float = 0.0

    @property
    def rounds(self) -> bool:
        return self.leak not in (0, 1)


@dataclass(frozen=True)
class MaxPool(Monotone):
    """The largest entry of each window; ``function`` can also tell where it is."""

    where: Callable[[Tensor], tuple[Tensor, Tensor]]
    """x ↦ the pooled values, and for each the number of its entry within a flat channel."""
    overlap: int | None
    """At most so many windows share an entry; None where that is not known."""

    @property
    def rounds(self) -> bool:
        return False


@dataclass(frozen=True)
class PairwiseMax(Monotone):
    """MaxMin: x ↦ (max(a, b), min(a, b)) for the two halves a, b of the channels."""

    @property
    def rounds(self) -> bool:
        return False


@dataclass(frozen=True)
class Sum(Operator):
    """The first input plus (or minus) the second."""

    sign: int = 1


@dataclass(frozen=True)
class Concatenate(Operator):
    """The inputs side by side along a dimension."""

    dim: int


@dataclass(frozen=True)
class LipschitzMap(Operator):
    """A function of each example of which nothing is known but a Lipschitz constant, from l_2 to l_2."""

    function: Map
    constant: float
    roundings: int = 2**16
    """What computing it may err by, in roundings of a number as long as its input and its value at 0 together."""


@dataclass(frozen=True)
class Softmax(Operator):
    """z ↦ exp(z) / Σ exp(z) over a dimension, or the logarithm of that."""

    log: bool
    dim: int = 1


@dataclass(frozen=True)
class Node:
    """An operator, which earlier values it reads (0 is the network's input), and where it stands."""

    operator: Operator
    inputs: tuple[int, ...]
    path: str
    shape: Shape
    """Of its result."""


@dataclass(frozen=True)
class Graph:
    """Node i computes value i + 1 from values before it; the last value is the logits."""

    nodes: list[Node]
    input_shape: Shape
    heads: tuple[Softmax, ...] = ()
    """What the network makes of the logits in the end, first to last; see ``holdfast.bounds.heads``."""
    structure: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)
    """What was found out about it that hangs on no weight."""

    def shape(self, value: int) -> Shape:
        """Of one example's value."""
        return self.nodes[value - 1].shape if value else self.input_shape


@singledispatch
def apply(operator: Operator, *values: Tensor) -> Tensor:
    """What the operator computes; a new kind that is neither affine nor a function registers here."""
    raise TypeError(
        f"{type(operator).__name__} cannot be computed; holdfast.bounds.operators.apply.register adds it"
    )


@apply.register
def _(operator: Affine, value: Tensor) -> Tensor:
    return operator.forward(value)


@apply.register(Monotone)
@apply.register(Elementwise)
@apply.register(LipschitzMap)
def _(operator: Monotone | Elementwise | LipschitzMap, value: Tensor) -> Tensor:
    return operator.function(value)


@apply.register
def _(operator: Sum, first: Tensor, second: Tensor) -> Tensor:
    return first + operator.sign * second


@apply.register
def _(operator: Concatenate, *values: Tensor) -> Tensor:
    return torch.cat(values, operator.dim)


@apply.register
def _(operator: Softmax, value: Tensor) -> Tensor:
    return value.log_softmax(operator.dim) if operator.log else value.softmax(operator.dim)


def walk(
    graph: Graph, known: dict[int, Value], step: Callable[..., Value], numbers: Iterable[int] | None = None
) -> dict[int, Value]:
    """The one way forward through a graph, in whatever domain: values by number, added to what is known.

    Args:
        step: (number of the node, its operator, its inputs...) → its value.
        numbers: of the nodes, ascending; all by default.
    """
    for number in range(len(graph.nodes)) if numbers is None else numbers:
        node = graph.nodes[number]
        try:
            known[number + 1] = step(number, node.operator, *(known[i] for i in node.inputs))
        except OutsideDomain as fault:
            raise OutsideDomain(f"at {node.path}: {fault}") from None
    return known


def computed(graph: Graph, known: dict[int, Tensor], numbers: Iterable[int] | None = None) -> dict[int, Tensor]:
    """What the network itself computes."""
    return walk(graph, known, lambda number, operator, *values: apply(operator, *values), numbers)


def run(graph: Graph, value: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """What the graph computes from value number ``start``, which nothing after it may look past; (N, ...)."""
    stop = len(graph.nodes) if stop is None else stop
    return computed(graph, {start: value}, range(start, stop))[stop]


def positive(function: Map) -> Affine:
    """A linear map with non-negative weights: pooling by average."""
    return Affine(function, function)


def moved(function: Map) -> Affine:
    """A linear map that only moves entries: reshaping, permuting."""
    return Affine(function, function, entrywise=True)
