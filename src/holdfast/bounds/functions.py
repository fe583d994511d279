"""Which operator a traced function call is, by the function."""

from __future__ import annotations

import operator as python
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree

from holdfast.bounds.kinds import (
    ABS,
    RELU,
    SIGMOID,
    SILU,
    TANH,
    average_pool_with,
    batch_norm,
    between,
    gelu,
    leaky,
    max_pool_of,
)
from holdfast.bounds.operators import (
    Affine,
    Concatenate,
    Convolution,
    Linear,
    MaxPool,
    Operator,
    Softmax,
    Sum,
    UnsupportedOperator,
    moved,
    positive,
)


@dataclass(frozen=True)
class Argument:
    """Stands for an activation among the arguments of a traced call."""

    value: Tensor


@dataclass(frozen=True)
class Call:
    """A traced call: the function, its arguments with activations wrapped in ``Argument``, and its result."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Tensor

    @property
    def activation(self) -> Tensor:
        """The first activation among the arguments."""
        return next(a.value for a in (*self.args, *self.kwargs.values()) if isinstance(a, Argument))

    def __call__(self, x: Tensor) -> Tensor:
        """The same call with x in the place of its only activation."""
        args, kwargs = _pytree.tree_map(lambda a: x if isinstance(a, Argument) else a, (self.args, self.kwargs))
        result: Tensor = self.function(*args, **kwargs)
        return result


def _reshaping(call: Call) -> Operator:
    shape = call.result.shape[1:]
    return moved(lambda x: x.reshape(len(x), *shape))


def _rearranging(call: Call) -> Operator:
    """A permutation, selection or mean, which must leave the batch dimension alone."""
    x = call.activation
    numbers = torch.arange(len(x), dtype=x.dtype, device=x.device)
    moved = call(numbers.view(-1, *[1] * (x.dim() - 1)).expand(x.shape))
    if moved.shape[:1] != numbers.shape or (moved.reshape(len(x), -1) != numbers[:, None]).any():
        raise UnsupportedOperator("it mixes or moves the examples of the batch")
    return positive(call)


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
    if len(call.args) != 2 or call.kwargs or all(isinstance(a, Argument) for a in call.args):
        raise UnsupportedOperator("only a product with a constant has a rule")
    factor = _real(call.args[0] if isinstance(call.args[1], Argument) else call.args[1], call)
    return Affine(lambda x: x * factor, lambda radius: radius * abs(factor), entrywise=_each(call))


def _quotient(call: Call) -> Operator:
    if len(call.args) != 2 or call.kwargs or isinstance(call.args[1], Argument):
        raise UnsupportedOperator("only a division by a constant has a rule")
    divisor = _real(call.args[1], call)
    return Affine(lambda x: x / divisor, lambda radius: radius / abs(divisor), entrywise=_each(call))


def _negation(call: Call) -> Operator:
    return Affine(call, lambda radius: radius, entrywise=True)


def _matrix_product(call: Call) -> Operator:
    if len(call.args) != 2 or not isinstance(call.args[0], Argument) or call.args[1].dim() != 2:
        raise UnsupportedOperator("only a product with a constant matrix from the right has a rule")
    return Linear(call.args[1].T, None)


def _clamp(call: Call) -> Operator:
    limits = [*call.args[1:], *call.kwargs.values()]
    if not all(limit is None or isinstance(limit, int | float) for limit in limits):
        raise UnsupportedOperator("only a clamp between numbers has a rule")
    if any(isinstance(a, Argument) for a in limits) or not isinstance(call.args[0], Argument):
        raise UnsupportedOperator("only a clamp between numbers has a rule")
    low = call.args[1] if len(call.args) > 1 else call.kwargs.get("min", call.kwargs.get("min_val"))
    high = call.args[2] if len(call.args) > 2 else call.kwargs.get("max", call.kwargs.get("max_val"))
    return between(low, high)


def _hard_tanh(call: Call) -> Operator:
    def rule(input: Argument, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Operator:
        return between(min_val, max_val)

    return rule(*call.args, **call.kwargs)


def _concatenation(call: Call) -> Operator:
    parts, *rest = call.args or (call.kwargs["tensors"],)
    dim = rest[0] if rest else call.kwargs.get("dim", call.kwargs.get("axis", 0))
    dim = dim % call.result.dim()
    if dim == 0 or not all(isinstance(part, Argument) for part in parts):
        raise UnsupportedOperator("only activations can be concatenated, and not along the batch")
    return Concatenate(dim)


def _leaky_relu(call: Call) -> Operator:
    slope = call.args[1] if len(call.args) > 1 else call.kwargs.get("negative_slope", 0.01)
    return leaky(slope)


def _linear(call: Call) -> Operator:
    def rule(input: Argument, weight: Tensor, bias: Tensor | None = None) -> Operator:
        return Linear(weight, bias)

    return rule(*call.args, **call.kwargs)


def _conv2d(call: Call) -> Operator:
    def rule(
        input: Argument,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Operator:
        if isinstance(padding, str):
            rest = stride, padding, dilation, groups
            return Affine(
                lambda x: F.conv2d(x, weight, bias, *rest),
                lambda radius: F.conv2d(radius, weight.abs(), None, *rest),
            )
        stride, padding, dilation = (
            (v, v) if isinstance(v, int) else (tuple(v) * 2)[:2] for v in (stride, padding, dilation)
        )
        return Convolution(weight, bias, stride, padding, dilation, groups)

    return rule(*call.args, **call.kwargs)


def _gelu_call(call: Call) -> Operator:
    return gelu(call.kwargs.get("approximate", call.args[1] if len(call.args) > 1 else "none"))


def _interpolation(call: Call) -> Operator:
    if "bicubic" in (*call.args, *call.kwargs.values()):
        raise UnsupportedOperator("bicubic interpolation has negative weights, for which there is no rule")
    return positive(call)


def _average_pool(call: Call) -> Operator:
    divisor = call.args[6] if len(call.args) > 6 else call.kwargs.get("divisor_override")
    return average_pool_with(divisor, call)


def _functional_dropout(call: Call) -> Operator:
    if call.args[2] if len(call.args) > 2 else call.kwargs.get("training", True):
        raise UnsupportedOperator("it drops in eval mode too; pass training=self.training")
    return moved(lambda x: x)


def _selection(call: Call) -> Operator:
    index = call.args[1] if len(call.args) > 1 else 0
    if call.function is python.getitem:
        first = index[0] if isinstance(index, tuple) else index
        whole = first == slice(None) if isinstance(first, slice) else first is Ellipsis
    else:
        whole = index % call.activation.dim() != 0
    if not whole:
        raise UnsupportedOperator("it selects among the examples of the batch")
    return _rearranging(call)


def _max_pool(call: Call) -> Operator:
    def rule(
        input: Argument,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Operator:
        rest = kernel_size, stride or kernel_size, padding, dilation, ceil_mode, True
        function: Any = F.max_pool2d
        return max_pool_of(kernel_size, stride, dilation, 2, lambda x: function(x, *rest))

    if not isinstance(call.result, Tensor):
        raise UnsupportedOperator("max-pooling that returns indices has no rule")
    return rule(*call.args, **call.kwargs)


def _adaptive_max_pool(call: Call) -> Operator:
    if not isinstance(call.result, Tensor):
        raise UnsupportedOperator("max-pooling that returns indices has no rule")
    size = tuple(call.result.shape[2:])
    even = all(n % k == 0 for n, k in zip(call.activation.shape[2:], size, strict=True))
    overlap = 1 if even else None
    function: Any = F.adaptive_max_pool2d
    return MaxPool(lambda x: function(x, size), lambda x: function(x, size, True), overlap)


def _export_batch_norm(call: Call) -> Operator:
    @dataclass(frozen=True)
    class Settings:
        weight: Tensor | None
        bias: Tensor | None
        eps: float

    _, weight, bias, mean, var, training, _, eps, *_ = call.args
    if training:
        raise UnsupportedOperator("BatchNorm on batch statistics mixes the examples of a batch")
    return batch_norm(Settings(weight, bias, eps), mean, var)


def _softmax(call: Call, log: bool) -> Operator:
    def rule(input: Argument, dim: int | None = None, *rest: Any, dtype: Any = None, **other: Any) -> Operator:
        if dtype is not None or any(isinstance(each, torch.dtype) for each in rest):
            raise UnsupportedOperator("a softmax in another dtype has no rule")
        return Softmax(log, 1 if dim is None else dim)

    return rule(*call.args, **call.kwargs)


_aten = torch.ops.aten
_DIFFERENCES = {python.sub, python.isub, torch.sub, Tensor.sub, _aten.sub.Tensor}
_ROWS: list[tuple[Callable[[Call], Operator], list[Any]]] = [
    (
        _sum,
        [python.add, python.iadd, torch.add, Tensor.add, Tensor.add_, _aten.add.Tensor, _aten.add_.Tensor],
    ),
    (_sum, list(_DIFFERENCES)),
    (_product, [python.mul, python.imul, torch.mul, Tensor.mul, _aten.mul.Tensor]),
    (_quotient, [python.truediv, python.itruediv, torch.div, Tensor.div, _aten.div.Tensor]),
    (_concatenation, [torch.cat, torch.concat, torch.concatenate, _aten.cat.default]),
    (_linear, [F.linear, _aten.linear.default]),
    (_conv2d, [F.conv2d, _aten.conv2d.default]),
    (_export_batch_norm, [_aten.batch_norm.default]),
    (_leaky_relu, [F.leaky_relu, _aten.leaky_relu.default, _aten.leaky_relu_.default]),
    (partial(_softmax, log=False), [F.softmax, torch.softmax, Tensor.softmax, _aten.softmax.int]),
    (partial(_softmax, log=True), [F.log_softmax, torch.log_softmax, Tensor.log_softmax, _aten.log_softmax.int]),
    (_max_pool, [F.max_pool2d, _aten.max_pool2d.default]),
    (_adaptive_max_pool, [F.adaptive_max_pool2d]),
    (lambda call: RELU, [F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_]),
    (lambda call: RELU, [_aten.relu.default, _aten.relu_.default]),
    (lambda call: SIGMOID, [F.sigmoid, torch.sigmoid, Tensor.sigmoid, _aten.sigmoid.default]),
    (lambda call: TANH, [F.tanh, torch.tanh, Tensor.tanh, _aten.tanh.default]),
    (lambda call: SILU, [F.silu, _aten.silu.default, _aten.silu_.default]),
    (lambda call: ABS, [abs, torch.abs, Tensor.abs, _aten.abs.default]),
    (lambda call: between(0.0, 6.0), [F.relu6, _aten.relu6.default]),
    (_hard_tanh, [F.hardtanh, _aten.hardtanh.default, _aten.hardtanh_.default]),
    (_gelu_call, [F.gelu, _aten.gelu.default]),
    (_interpolation, [F.interpolate]),
    (_average_pool, [F.avg_pool2d, _aten.avg_pool2d.default]),
    (lambda call: positive(call), [F.adaptive_avg_pool2d, _aten.adaptive_avg_pool2d.default]),
    (_functional_dropout, [F.dropout, F.dropout2d, _aten.dropout.default]),
    (_clamp, [torch.clamp, Tensor.clamp, torch.clip, Tensor.clip, _aten.clamp.default]),
    (_negation, [python.neg, torch.neg, Tensor.neg, _aten.neg.default]),
    (_matrix_product, [python.matmul, torch.matmul, Tensor.matmul, _aten.matmul.default]),
    (
        _rearranging,
        [torch.permute, Tensor.permute, torch.transpose, Tensor.transpose, torch.mean, Tensor.mean],
    ),
    (_selection, [python.getitem, _aten.slice.Tensor, _aten.select.int]),
    (_rearranging, [_aten.permute.default, _aten.transpose.int, _aten.mean.dim]),
    (_reshaping, [torch.flatten, Tensor.flatten, torch.reshape, Tensor.reshape, Tensor.view]),
    (_reshaping, [torch.squeeze, Tensor.squeeze, torch.unsqueeze, Tensor.unsqueeze, Tensor.contiguous]),
    (_reshaping, [_aten.flatten.using_ints, _aten.reshape.default, _aten.view.default, _aten.squeeze.dims]),
    (_reshaping, [_aten.squeeze.dim, _aten.unsqueeze.default, _aten.contiguous.default]),
]
FUNCTIONS: dict[Any, Callable[[Call], Operator]] = {
    function: rule for rule, functions in _ROWS for function in functions
}
"""Operator of a traced function call, by the function; a method goes by its function in ``torch.Tensor``."""
