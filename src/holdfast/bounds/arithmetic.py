"""Calls that add, scale and multiply by constants, or take the larger or the smaller of two."""

from __future__ import annotations

import operator as python
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.bounds.calls import Argument, Call, Chain, Lowered, Rows, Steps, number, shaped, spelled, spread_to
from holdfast.bounds.kinds import RECIPROCAL, RELU, SQUARE, between
from holdfast.bounds.operators import (
    Affine,
    Concatenate,
    Linear,
    Operator,
    PairwiseMax,
    Sum,
    UnsupportedOperator,
)
from holdfast.bounds.products import product_of, quotient_of


def _sum(call: Call, sign: int) -> Lowered:
    """first + sign · alpha · second."""

    def rule(input: Any, other: Any, *, alpha: float = 1) -> Lowered:
        first, second = input, other
        if isinstance(first, Argument) and isinstance(second, Argument):
            steps = Chain(call)
            numbers = together(steps, call, first, second)
            if alpha != 1:
                numbers = numbers[0], steps.add(scaled(alpha, True), numbers[1])
            steps.add(Sum(sign), *numbers)
            return steps.steps if numbers != (0, 1) or alpha != 1 or len(steps.made) > 1 else Sum(sign)
        if isinstance(first, Argument):
            added = second if sign * alpha == 1 else sign * alpha * _real(second, call)
            return shifted(added, call)
        return shifted(first, call, sign * alpha)

    return call.read(rule)


def _reversed_difference(call: Call) -> Lowered:
    """other − α · input."""

    def rule(input: Any, other: Any, alpha: float = 1) -> Lowered:
        if isinstance(other, Argument):
            raise UnsupportedOperator("only a constant minus an activation has a rule by this name")
        return shifted(other, call, -alpha)

    return call.read(rule)


def shifted(constant: Any, call: Call, factor: float = 1) -> Operator:
    """factor · x + constant, which may broadcast the activation, and its radius with it."""
    shape = call.result.shape[1:]
    return Affine(
        (lambda x: x + constant) if factor == 1 else (lambda x: constant + factor * x),
        lambda r: (r if abs(factor) == 1 else abs(factor) * r).expand(len(r), *shape),
        entrywise=_each(call),
    )


def scaled(factor: float, entrywise: bool) -> Operator:
    return Affine(lambda x: x * factor, lambda radius: radius * abs(factor), entrywise=entrywise)


def together(steps: Chain, call: Call, *parts: Argument) -> tuple[int, ...]:
    """The numbers of activations, each spread to the shape of what they make together.

    Raises:
        UnsupportedOperator: broadcasting would put an example beside another.
    """
    if len({part.value.dim() for part in parts}) > 1:
        shapes = " and ".join(str(tuple(part.value.shape)) for part in parts)
        raise UnsupportedOperator(
            f"activations of shapes {shapes} broadcast along the batch; unsqueeze the smaller one behind it"
        )
    shape = tuple(torch.broadcast_shapes(*(part.value.shape for part in parts))[1:])
    return tuple(
        part.place if part.value.shape[1:] == shape else steps.add(spread_to(part.value, shape), part.place)
        for part in parts
    )


def _in_order(first: Argument, second: Argument) -> tuple[Tensor, Tensor]:
    if first.place > second.place:
        raise UnsupportedOperator("its arguments by keyword stand the other way round; give the first one first")
    return first.value, second.value


def _each(call: Call) -> bool:
    """Whether an entry of the activation is read for one entry of the result: no constant broadcasts it."""
    return bool(call.result.shape == call.activation.shape)


def _real(constant: Any, call: Call) -> Any:
    """A constant in the activation's own type: the absolute value of the smallest int8 is negative."""
    return constant.to(call.activation.dtype) if isinstance(constant, Tensor) else constant


def _product(call: Call) -> Lowered:
    def rule(input: Any, other: Any) -> Operator:
        if isinstance(input, Argument) and isinstance(other, Argument):
            if input.value is other.value:
                return Steps(((SQUARE, (0,)),))
            return product_of(*_in_order(input, other))
        factor = _real(other if isinstance(input, Argument) else input, call)
        return Affine(lambda x: x * factor, lambda radius: radius * abs(factor), entrywise=_each(call))

    return call.read(rule)


def _quotient(call: Call) -> Lowered:
    def rule(input: Any, other: Any, *, rounding_mode: str | None = None) -> Operator:
        if rounding_mode is not None:
            raise UnsupportedOperator(f"a division that rounds ({rounding_mode}) has no rule")
        if isinstance(input, Argument) and isinstance(other, Argument):
            return quotient_of(*_in_order(input, other))
        if isinstance(other, Argument):
            factor = _real(input, call)
            scaling = Affine(lambda x: x * factor, lambda radius: radius * abs(factor), entrywise=_each(call))
            return Steps(((RECIPROCAL, (0,)), (scaling, (1,))))
        divisor = _real(other, call)
        return Affine(lambda x: x / divisor, lambda radius: radius / abs(divisor), entrywise=_each(call))

    return call.read(rule)


def _negation(call: Call) -> Operator:
    return Affine(torch.neg, lambda radius: radius, entrywise=True)


def _matrix_product(call: Call) -> Lowered:
    def rule(input: Any, other: Any) -> Lowered:
        if isinstance(input, Argument) and isinstance(other, Argument):
            return product_of(*_in_order(input, other), matrices=True)
        if isinstance(input, Argument):
            if other.dim() == 2:
                return Linear(other.T, None)
            return bilinear(torch.matmul, other, call)
        if call.activation.dim() < 3 or input.dim() > call.activation.dim():
            raise UnsupportedOperator("a matrix from the left mixes the examples of the batch")
        return bilinear(lambda x, w: torch.matmul(w, x), input, call)

    return call.read(rule)


def bilinear(function: Callable[[Tensor, Tensor], Tensor], constant: Tensor, call: Call) -> Operator:
    """A product of sums with a constant: in |W| the constant's absolute values take its place."""
    size = constant.abs()
    return Affine(
        lambda x: function(x, constant),
        lambda radius: function(radius, size),
        summands=max(constant.numel(), call.activation[0].numel()),
    )


def _added_product(call: Call) -> Lowered:
    """β · input + α · x W."""

    def rule(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Lowered:
        if not isinstance(mat1, Argument) or isinstance(mat2, Argument) or isinstance(input, Argument):
            raise UnsupportedOperator("only a constant plus an activation times a constant matrix has a rule")
        weight = mat2.T if alpha == 1 else alpha * mat2.T
        bias = input if beta == 1 else beta * input
        if bias.numel() not in (1, len(weight)):
            raise UnsupportedOperator(f"its addend of shape {tuple(bias.shape)} differs from example to example")
        return Linear(weight, bias.reshape(-1).expand(len(weight)))

    return call.read(rule)


def _einstein_sum(call: Call) -> Lowered:
    """Of one activation and constants, the batch's letter being the first of the activation and of the result."""

    def rule(equation: str, *operands: Any) -> Lowered:
        operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
        places = [place for place, each in enumerate(operands) if isinstance(each, Argument)]
        reads, arrow, makes = equation.replace(" ", "").partition("->")
        letters = reads.split(",")
        if len(places) != 1 or not arrow or "." in equation:
            raise UnsupportedOperator("only einsum of one activation and constants, with an arrow, has a rule")
        batch, place = letters[places[0]][:1], places[0]
        if makes[:1] != batch or "".join(letters).count(batch) != 1:
            raise UnsupportedOperator("it mixes or moves the examples of the batch")

        def of(x: Tensor, sizes: bool = False) -> Tensor:
            every = [x if n == place else each.abs() if sizes else each for n, each in enumerate(operands)]
            return torch.einsum(equation, *every)

        count = max(each.numel() for each in operands if isinstance(each, Tensor)) if len(operands) > 1 else 1
        return Affine(of, partial(of, sizes=True), summands=max(count, call.activation[0].numel()))

    return call.read(rule)


def _linear(call: Call) -> Lowered:
    def rule(input: Any, weight: Any, bias: Any = None) -> Lowered:
        if isinstance(weight, Argument) or isinstance(bias, Argument):
            raise UnsupportedOperator("a weight that depends on the input has no rule")
        if weight.dim() == 1:
            return bilinear(F.linear, weight, call)
        return Linear(weight, bias)

    return call.read(rule)


def extreme(call: Call, largest: bool) -> Lowered:
    """The larger or the smaller of two, entry by entry."""

    def rule(input: Any, other: Any) -> Lowered:
        if not (isinstance(input, Argument) and isinstance(other, Argument)):
            limit = other if isinstance(input, Argument) else input
            return limited(call, *((limit, None) if largest else (None, limit)))
        steps, shape = Chain(call), tuple(call.result.shape[1:])
        pair = [steps.add(shaped((-1, 1)), part) for part in together(steps, call, input, other)]
        both = steps.add(shaped((-1,)), steps.add(Concatenate(2), *pair))
        sorted_ = steps.add(PairwiseMax(_max_min), both)
        chosen = steps.add(_every_other(0 if largest else 1), sorted_)
        steps.add(shaped(shape), chosen)
        return steps.steps

    return call.read(rule)


def _max_min(x: Tensor) -> Tensor:
    first, second = x[:, ::2], x[:, 1::2]
    return torch.stack([torch.maximum(first, second), torch.minimum(first, second)], 2).flatten(1)


def _every_other(start: int) -> Operator:
    def function(x: Tensor) -> Tensor:
        return x[:, start::2]

    return Affine(function, function, entrywise=True)


def limited(call: Call, low: Any, high: Any) -> Lowered:
    """A clamp between numbers, or between tensors: max(x, c) = relu(x − c) + c, min(x, c) = c − relu(c − x)."""
    if all(limit is None or number(limit) for limit in (low, high)):
        return between(low, high)
    if any(isinstance(limit, Argument) for limit in (low, high)):
        raise UnsupportedOperator("a clamp between activations has no rule")
    x = call.activation
    steps, last = Chain(call), call.activations[0].place
    if tuple(x.shape) != tuple(call.result.shape):
        last = steps.add(spread_to(x, tuple(call.result.shape[1:])), last)
    for limit, sign in ((low, 1), (high, -1)):
        if limit is not None:
            last = steps.add(_scaled_and_shifted(sign, -sign * limit), last)
            last = steps.add(RELU, last)
            last = steps.add(_scaled_and_shifted(sign, limit), last)
    return steps.steps


def _scaled_and_shifted(sign: int, constant: Any) -> Operator:
    """sign · x + constant, entry by entry."""
    return Affine(lambda x: sign * x + constant, lambda radius: radius, entrywise=True)


_aten = torch.ops.aten
ARITHMETIC: Rows = [
    (partial(_sum, sign=1), [*spelled("add", "add_"), python.add, python.iadd]),
    (partial(_sum, sign=-1), [*spelled("sub", "sub_", "subtract"), python.sub, python.isub]),
    (_reversed_difference, spelled("rsub")),
    (_product, [*spelled("mul", "mul_", "multiply"), python.mul, python.imul]),
    (_quotient, [*spelled("div", "div_", "divide", "true_divide"), python.truediv, python.itruediv]),
    (_linear, spelled("linear")),
    (_added_product, spelled("addmm")),
    (_einstein_sum, spelled("einsum")),
    (_negation, [*spelled("neg", "negative"), python.neg]),
    (_matrix_product, [*spelled("matmul", "mm", "bmm"), python.matmul]),
    (partial(extreme, largest=True), spelled("maximum", "fmax")),
    (partial(extreme, largest=False), spelled("minimum", "fmin")),
]
