"""Which operator a module or a function is. What has no rule here is refused by name, never skipped."""

from __future__ import annotations

import operator as python
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree

from holdfast.bounds.operators import (
    Affine,
    Concatenate,
    Convolution,
    Elementwise,
    Linear,
    MaxPool,
    Operator,
    PairwiseMax,
    Rectifier,
    Sum,
    UnsupportedOperator,
    moved,
    positive,
)
from holdfast.layers import MaxMin, Normalize


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

    def on(self, x: Tensor) -> Tensor:
        """The same call with x in the place of its only activation."""
        args, kwargs = _pytree.tree_map(lambda a: x if isinstance(a, Argument) else a, (self.args, self.kwargs))
        return self.function(*args, **kwargs)


def _scale(x: Tensor, value: Tensor) -> Tensor:
    """A per-channel value, shaped to multiply x of shape (N, C, ...)."""
    return value.view(-1, *[1] * (x.dim() - 2))


def batch_norm(module: Any, mean: Tensor | None, var: Tensor | None) -> Operator:
    """BatchNorm with given statistics: γ (x − mean) / √(var + ε) + β."""
    if mean is None or var is None:
        raise UnsupportedOperator("BatchNorm without running statistics mixes the examples of a batch")
    scale = (var + module.eps).rsqrt()
    scale = scale if module.weight is None else scale * module.weight
    shift = -mean * scale
    shift = shift if module.bias is None else shift + module.bias
    return Affine(
        lambda x: _scale(x, scale) * x + _scale(x, shift),
        lambda radius: _scale(radius, scale.abs()) * radius,
        entrywise=True,
    )


def _convolution(module: Any) -> Operator:
    if module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return Convolution(
            module.weight, module.bias, module.stride, module.padding, module.dilation, module.groups
        )
    return Affine(  # _conv_forward applies the module's own padding mode
        lambda x: module._conv_forward(x, module.weight, module.bias),
        lambda radius: module._conv_forward(radius, module.weight.abs(), None),
    )


def _transposed_convolution(module: Any) -> Operator:
    function = {nn.ConvTranspose1d: F.conv_transpose1d, nn.ConvTranspose2d: F.conv_transpose2d}[type(module)]
    rest = module.stride, module.padding, module.output_padding, module.groups, module.dilation
    return Affine(
        lambda x: function(x, module.weight, module.bias, *rest),
        lambda radius: function(radius, module.weight.abs(), None, *rest),
    )


def _upsampling(module: nn.Upsample) -> Operator:
    if module.mode == "bicubic":
        raise UnsupportedOperator("bicubic interpolation has negative weights, for which there is no rule")
    return positive(module)


def _leaky(slope: float) -> Operator:
    if slope < 0:
        raise UnsupportedOperator(f"an activation of negative slope {slope} is not monotone")
    if slope <= 1:
        return Rectifier(lambda v: F.leaky_relu(v, slope), (0.0,), leak=slope)
    return Elementwise(lambda v: F.leaky_relu(v, slope), (0.0,), steepest=slope)


def _elu(alpha: float) -> Operator:
    if alpha < 0:
        raise UnsupportedOperator(f"an activation of negative slope {alpha} is not monotone")
    return Elementwise(lambda v: F.elu(v, alpha), (0.0,), curvature=alpha, steepest=max(1.0, alpha))


def _between(low: float | None, high: float | None) -> Operator:
    kinks = tuple(float(limit) for limit in (low, high) if limit is not None)
    return Elementwise(lambda v: v.clamp(low, high), kinks)


def _gelu(approximate: str = "none") -> Operator:
    turn = {"none": -0.7517915, "tanh": -0.7524614}[approximate]
    return Elementwise(lambda v: F.gelu(v, approximate=approximate), curvature=0.82, turns=(turn,), steepest=1.13)


RELU = Rectifier(torch.relu, (0.0,))
SIGMOID = Elementwise(torch.sigmoid, curvature=0.0963, steepest=0.25)
TANH = Elementwise(torch.tanh, curvature=0.7699)
SILU = Elementwise(F.silu, curvature=0.5, turns=(-1.2784645,), steepest=1.1)
ABS = Elementwise(torch.abs, (0.0,), turns=(0.0,))


def _max_pool_of(size: Any, stride: Any, dilation: Any, dims: int, rest: Callable[..., Any]) -> Operator:
    def each(value: Any) -> tuple[int, ...]:
        return (value,) * dims if isinstance(value, int) else tuple(value)

    sizes, dilations = each(size), each(dilation)
    strides = each(stride) if stride else sizes
    overlap = 1
    for k, s, d in zip(sizes, strides, dilations, strict=True):
        overlap *= min(k, -(-((k - 1) * d + 1) // s))
    return MaxPool(lambda x: rest(x)[0], rest, overlap)


def _max_pool_module(module: Any) -> Operator:
    if module.return_indices:
        raise UnsupportedOperator("max-pooling that returns indices has no rule")
    function: Any = F.max_pool1d if isinstance(module, nn.MaxPool1d) else F.max_pool2d
    rest = module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode, True
    dims = 1 if isinstance(module, nn.MaxPool1d) else 2
    return _max_pool_of(module.kernel_size, module.stride, module.dilation, dims, lambda x: function(x, *rest))


def _adaptive_max_pool_module(module: Any) -> Operator:
    function: Any = F.adaptive_max_pool1d if isinstance(module, nn.AdaptiveMaxPool1d) else F.adaptive_max_pool2d
    size = module.output_size
    sizes = (size,) if isinstance(size, int) else tuple(size)
    overlap = 1 if set(sizes) == {1} else None
    return MaxPool(lambda x: function(x, size), lambda x: function(x, size, True), overlap)


def _normalize(module: Normalize) -> Operator:
    return Affine(module, lambda radius: radius / _scale(radius, module.std), entrywise=True)


def _dropout(module: Any) -> Operator:
    return moved(lambda x: x)  # bounds are those of the network in eval mode


MODULES: dict[type[nn.Module], Callable[[Any], Operator]] = {
    nn.Linear: lambda module: Linear(module.weight, module.bias),
    Normalize: _normalize,
    MaxMin: lambda module: PairwiseMax(module),
    **dict.fromkeys([nn.Conv1d, nn.Conv2d], _convolution),
    **dict.fromkeys([nn.ConvTranspose1d, nn.ConvTranspose2d], _transposed_convolution),
    nn.ReLU: lambda module: RELU,
    nn.LeakyReLU: lambda module: _leaky(module.negative_slope),
    nn.ELU: lambda module: _elu(module.alpha),
    nn.ReLU6: lambda module: _between(0.0, 6.0),
    nn.Hardtanh: lambda module: _between(module.min_val, module.max_val),
    nn.Sigmoid: lambda module: SIGMOID,
    nn.Tanh: lambda module: TANH,
    nn.SiLU: lambda module: SILU,
    nn.GELU: lambda module: _gelu(module.approximate),
    nn.Softplus: lambda module: _softplus(module),
    nn.AvgPool2d: lambda module: _average_pool_module(module),
    nn.Upsample: _upsampling,
    **dict.fromkeys([nn.MaxPool1d, nn.MaxPool2d], _max_pool_module),
    **dict.fromkeys([nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d], _adaptive_max_pool_module),
    **dict.fromkeys([nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d], positive),
    **dict.fromkeys([nn.Flatten, nn.Unflatten, nn.Identity, nn.PixelShuffle, nn.PixelUnshuffle], moved),
    **dict.fromkeys([nn.ZeroPad2d, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d], positive),
    **dict.fromkeys([nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout], _dropout),
}
"""Operator of a leaf module, by its exact type; BatchNorm apart, which needs the statistics of the pass."""


def _reshaping(call: Call) -> Operator:
    shape = call.result.shape[1:]
    return moved(lambda x: x.reshape(len(x), *shape))


def _rearranging(call: Call) -> Operator:
    """A permutation, selection or mean, which must leave the batch dimension alone."""
    x = call.activation
    numbers = torch.arange(len(x), dtype=x.dtype, device=x.device)
    moved = call.on(numbers.view(-1, *[1] * (x.dim() - 1)).expand(x.shape))
    if moved.shape[:1] != numbers.shape or (moved.reshape(len(x), -1) != numbers[:, None]).any():
        raise UnsupportedOperator("it mixes or moves the examples of the batch")
    return positive(call.on)


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
        return Affine(lambda x: x + sign * second, lambda r: r.expand(len(r), *shape), entrywise=True)
    return Affine(lambda x: first + sign * x, lambda r: r.expand(len(r), *shape), entrywise=True)


def _real(constant: Any, call: Call) -> Any:
    """A constant in the activation's own type: the absolute value of the smallest int8 is negative."""
    return constant.to(call.activation.dtype) if isinstance(constant, Tensor) else constant


def _product(call: Call) -> Operator:
    if len(call.args) != 2 or call.kwargs or all(isinstance(a, Argument) for a in call.args):
        raise UnsupportedOperator("only a product with a constant has a rule")
    factor = _real(call.args[0] if isinstance(call.args[1], Argument) else call.args[1], call)
    return Affine(lambda x: x * factor, lambda radius: radius * abs(factor), entrywise=True)


def _quotient(call: Call) -> Operator:
    if len(call.args) != 2 or call.kwargs or isinstance(call.args[1], Argument):
        raise UnsupportedOperator("only a division by a constant has a rule")
    divisor = _real(call.args[1], call)
    return Affine(lambda x: x / divisor, lambda radius: radius / abs(divisor), entrywise=True)


def _negation(call: Call) -> Operator:
    return Affine(call.on, lambda radius: radius, entrywise=True)


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
    return _between(low, high)


def _hard_tanh(call: Call) -> Operator:
    def rule(input: Argument, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Operator:
        return _between(min_val, max_val)

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
    return _leaky(slope)


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
    return _gelu(call.kwargs.get("approximate", call.args[1] if len(call.args) > 1 else "none"))


def _interpolation(call: Call) -> Operator:
    if "bicubic" in (*call.args, *call.kwargs.values()):
        raise UnsupportedOperator("bicubic interpolation has negative weights, for which there is no rule")
    return positive(call.on)


def _average_pool(call: Call) -> Operator:
    divisor = call.args[6] if len(call.args) > 6 else call.kwargs.get("divisor_override")
    return _with_positive_divisor(divisor, call.on)


def _average_pool_module(module: nn.AvgPool2d) -> Operator:
    return _with_positive_divisor(module.divisor_override, module)


def _with_positive_divisor(divisor: int | None, function: Callable[[Tensor], Tensor]) -> Operator:
    if divisor is not None and divisor <= 0:
        raise UnsupportedOperator(f"average pooling with divisor {divisor} has no rule")
    return positive(function)


def _softplus(module: nn.Softplus) -> Operator:
    if module.beta <= 0 or module.threshold < 15:
        raise UnsupportedOperator("softplus jumps down at its threshold; only the usual one, 20, has a rule")
    return Elementwise(module, curvature=module.beta / 4)


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
        return _max_pool_of(kernel_size, stride, dilation, 2, lambda x: function(x, *rest))

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
    (_max_pool, [F.max_pool2d, _aten.max_pool2d.default]),
    (_adaptive_max_pool, [F.adaptive_max_pool2d]),
    (lambda call: RELU, [F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_]),
    (lambda call: RELU, [_aten.relu.default, _aten.relu_.default]),
    (lambda call: SIGMOID, [F.sigmoid, torch.sigmoid, Tensor.sigmoid, _aten.sigmoid.default]),
    (lambda call: TANH, [F.tanh, torch.tanh, Tensor.tanh, _aten.tanh.default]),
    (lambda call: SILU, [F.silu, _aten.silu.default, _aten.silu_.default]),
    (lambda call: ABS, [abs, torch.abs, Tensor.abs, _aten.abs.default]),
    (lambda call: _between(0.0, 6.0), [F.relu6]),
    (_hard_tanh, [F.hardtanh, _aten.hardtanh.default, _aten.hardtanh_.default]),
    (_gelu_call, [F.gelu, _aten.gelu.default]),
    (_interpolation, [F.interpolate]),
    (_average_pool, [F.avg_pool2d, _aten.avg_pool2d.default]),
    (lambda call: positive(call.on), [F.adaptive_avg_pool2d, _aten.adaptive_avg_pool2d.default]),
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


def register(kind: Any, rule: Callable[[Any], Operator]) -> None:
    """Teach the bounds a module class (rule: module → Operator) or a function (rule: Call → Operator).

    >>> from holdfast.bounds import Monotone, register
    >>> register(torch.nn.LogSigmoid, Monotone)  # doctest: +SKIP

    Raises:
        ValueError: there is a rule already.
    """
    rules: dict[Any, Callable[[Any], Operator]] = MODULES if isinstance(kind, type) else FUNCTIONS
    if kind in rules:
        raise ValueError(f"{kind!r} has a bound rule already")
    rules[kind] = rule
