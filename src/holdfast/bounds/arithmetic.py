"""Calls that add, scale and multiply by constants."""

from __future__ import annotations

import operator as python
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.bounds.calls import Argument, Call, Rows, Steps
from holdfast.bounds.kinds import RECIPROCAL, SQUARE
from holdfast.bounds.operators import Affine, Linear, Operator, Sum, UnsupportedOperator
from holdfast.bounds.products import product_of, quotient_of


def _sum(call: Call) -> Operator:
    if len(call.args) != 2 or call.kwargs:
        raise UnsupportedOperator("only a plain sum or difference of two terms has a rule")
    first, second = call.args
    sign = -1 if call.function in _DIFFERENCES else 1
    if isinstance(first, Argument) and isinstance(second, Argument):
        if first.value.shape != second.value.shape:
            raise UnsupportedOperator("a sum of activations of different shapes has no rule")
        return Sum(sign)
    shape = call.result.shape[1:]  # a constant may broadcast the activation, and its radius with it
    if isinstance(first, Argument):
        return Affine(lambda x: x + sign * second, lambda r: r.expand(len(r), *shape), entrywise=_each(call))
    return Affine(lambda x: first + sign * x, lambda r: r.expand(len(r), *shape), entrywise=_each(call))


def _each(call: Call) -> bool:
    """Whether an entry of the activation is read for one entry of the result: no constant broadcasts it."""
    return call.result.shape == call.activation.shape


def _real(constant: Any, call: Call) -> Any:
    """A constant in the activation's own type: the absolute value of the smallest int8 is negative."""
    return constant.to(call.activation.dtype) if isinstance(constant, Tensor) else constant


def _product(call: Call) -> Operator:
    if len(call.args) != 2 or call.kwargs:
        raise UnsupportedOperator("only a plain product of two factors has a rule")
    first, second = call.args
    if isinstance(first, Argument) and isinstance(second, Argument):
        same = first.value is second.value
        return Steps(((SQUARE, (0,)),)) if same else product_of(first.value, second.value)
    factor = _real(call.args[0] if isinstance(call.args[1], Argument) else call.args[1], call)
    return Affine(lambda x: x * factor, lambda radius: radius * abs(factor), entrywise=_each(call))


def _quotient(call: Call) -> Operator:
    if len(call.args) != 2 or call.kwargs:
        raise UnsupportedOperator("only a plain quotient of two terms has a rule")
    first, second = call.args
    if isinstance(first, Argument) and isinstance(second, Argument):
        return quotient_of(first.value, second.value)
    if isinstance(second, Argument):
        factor = _real(first, call)
        scaled = Affine(lambda x: x * factor, lambda radius: radius * abs(factor), entrywise=_each(call))
        return Steps(((RECIPROCAL, (0,)), (scaled, (1,))))
    divisor = _real(call.args[1], call)
    return Affine(lambda x: x / divisor, lambda radius: radius / abs(divisor), entrywise=_each(call))


def _negation(call: Call) -> Operator:
    return Affine(call, lambda radius: radius, entrywise=True)


def _matrix_product(call: Call) -> Operator:
    if len(call.args) == 2 and all(isinstance(a, Argument) for a in call.args):
        return product_of(call.args[0].value, call.args[1].value, matrices=True)
    if len(call.args) != 2 or not isinstance(call.args[0], Argument) or call.args[1].dim() != 2:
        raise UnsupportedOperator("only a product with a constant matrix from the right has a rule")
    return Linear(call.args[1].T, None)


def _linear(call: Call) -> Operator:
    def rule(input: Argument, weight: Tensor, bias: Tensor | None = None) -> Operator:
        return Linear(weight, bias)

    return rule(*call.args, **call.kwargs)


_aten = torch.ops.aten
_DIFFERENCES = {python.sub, python.isub, torch.sub, Tensor.sub, _aten.sub.Tensor}
ARITHMETIC: Rows = [
    (
        _sum,
        [python.add, python.iadd, torch.add, Tensor.add, Tensor.add_, _aten.add.Tensor, _aten.add_.Tensor],
    ),
    (_sum, list(_DIFFERENCES)),
    (_product, [python.mul, python.imul, torch.mul, Tensor.mul, _aten.mul.Tensor]),
    (_quotient, [python.truediv, python.itruediv, torch.div, Tensor.div, _aten.div.Tensor]),
    (_linear, [F.linear, _aten.linear.default]),
    (_negation, [python.neg, torch.neg, Tensor.neg, _aten.neg.default]),
    (
        _matrix_product,
        [
            python.matmul,
            torch.matmul,
            torch.bmm,
            Tensor.matmul,
            Tensor.bmm,
            _aten.matmul.default,
            _aten.bmm.default,
        ],
    ),
]
