"""Calls that go over an image in windows: convolution, pooling, interpolation."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.bounds.arithmetic import extreme
from holdfast.bounds.calls import Argument, Call, Chain, Lowered, Rows, Several, Steps, constant, shaped, spelled
from holdfast.bounds.kinds import average_pool_with, max_pool_of, transposed_convolution
from holdfast.bounds.moves import reduced_dims
from holdfast.bounds.operators import (
    Affine,
    Convolution,
    MaxPool,
    Operator,
    UnsupportedOperator,
    moved,
    positive,
)


def each(value: Any, dims: int) -> tuple[int, ...]:
    """A setting of a window along each dimension."""
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)


def _convolution(call: Call) -> Lowered:
    def rule(
        input: Argument,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Operator:
        constant((weight, bias), "its weight")
        dims = weight.dim() - 2
        if dims not in (1, 2):
            raise UnsupportedOperator(f"a convolution in {dims} dimensions has no rule, only in one or two")
        if isinstance(padding, str) and padding != "valid":
            rest = stride, padding, dilation, groups
            function: Any = F.conv1d if dims == 1 else F.conv2d
            return Affine(
                lambda x: function(x, weight, bias, *rest),
                lambda radius: function(radius, weight.abs(), None, *rest),
                summands=max(weight[0].numel(), weight[:, 0].numel()),
            )
        padding = 0 if padding == "valid" else padding
        stride, padding, dilation = (each(value, dims) for value in (stride, padding, dilation))
        return Convolution(weight, bias, stride, padding, dilation, groups)

    return call.read(rule)


def _transposed_convolution(call: Call) -> Lowered:
    def rule(
        input: Argument,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Operator:
        constant((weight, bias), "its weight")
        return transposed_convolution(weight, bias, (stride, padding, output_padding, groups, dilation))

    return call.read(rule)


def _interpolation(call: Call) -> Operator:
    if "bicubic" in (*call.args, *call.kwargs.values()):
        raise UnsupportedOperator("bicubic interpolation has negative weights, for which there is no rule")
    return positive(call)


def _average_pool(call: Call) -> Operator:
    divisor = call.args[6] if len(call.args) > 6 else call.kwargs.get("divisor_override")
    return average_pool_with(divisor, call)


def _max_pool(call: Call) -> Lowered:
    def rule(
        input: Argument,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Lowered:
        dims = call.activation.dim() - 2
        if dims not in (1, 2):
            raise UnsupportedOperator(f"max-pooling in {dims} dimensions has no rule, only in one or two")
        rest = kernel_size, stride or kernel_size, padding, dilation, ceil_mode, True
        function: Any = F.max_pool1d if dims == 1 else F.max_pool2d
        pool = max_pool_of(kernel_size, stride, dilation, dims, lambda x: function(x, *rest))
        return pool if isinstance(call.result, Tensor) else Several((pool, None))

    return call.read(rule)


def _adaptive_max_pool(call: Call) -> Lowered:
    def rule(input: Argument, output_size: Any, return_indices: bool = False) -> Lowered:
        result = call.result if isinstance(call.result, Tensor) else call.result[0]
        size, sides = tuple(result.shape[2:]), tuple(input.value.shape[2:])
        function: Any = F.adaptive_max_pool1d if len(size) == 1 else F.adaptive_max_pool2d
        overlap = math.prod(map(_sharing, sides, size))
        pool = MaxPool(lambda x: function(x, size), lambda x: function(x, size, True), overlap)
        return pool if isinstance(call.result, Tensor) else Several((pool, None))

    return call.read(rule)


def _sharing(side: int, windows: int) -> int:
    """At most so many windows of adaptive pooling, ⌊i n / k⌋ up to ⌈(i + 1) n / k⌉, share an entry."""
    ends = [(i * side // windows, -(-(i + 1) * side // windows)) for i in range(windows)]
    return max(sum(low <= entry < high for low, high in ends) for entry in range(side))


def _largest(call: Call, sign: int) -> Lowered:
    """amax, amin: the largest entry over dimensions, or minus that of −x."""

    def rule(input: Argument, dim: Any = (), keepdim: bool = False) -> Lowered:
        return _of_windows(call, input, dim, sign)

    return call.read(rule)


def _largest_with_place(call: Call, sign: int) -> Lowered:
    """max and min: of two, of an activation altogether, or along one dimension, with the place beside it."""

    def rule(input: Argument, dim: Any = None, keepdim: bool = False) -> Lowered:
        if not isinstance(dim, int):
            raise UnsupportedOperator("it takes the largest of the whole batch; say along which dimension")
        steps = _of_windows(call, input, dim, sign)
        return steps if isinstance(call.result, Tensor) else Several((steps, None))

    if isinstance(call.result, Tensor) and len(call.args) + len(call.kwargs) == 2:
        return extreme(call, sign > 0)
    return call.read(rule)


def _of_windows(call: Call, input: Argument, dim: Any, sign: int) -> Steps:
    """The entries over these dimensions side by side, (N, 1, windows, entries), and the largest of each."""
    x = input.value
    dims = reduced_dims(x, dim, "takes the largest of")
    kept = [d for d in range(1, x.dim()) if d not in dims]
    size = torch.Size(x.shape[d] for d in dims).numel()
    result = call.result if isinstance(call.result, Tensor) else call.result[0]
    flip = Affine(torch.neg, lambda radius: radius, entrywise=True)
    steps, last = Chain(call), input.place
    last = steps.add(moved(lambda x: x.permute(0, *kept, *dims).reshape(len(x), 1, -1, size)), last)
    last = last if sign > 0 else steps.add(flip, last)
    last = steps.add(MaxPool(lambda x: x.amax(-1), partial(_where_largest, size=size), 1), last)
    last = last if sign > 0 else steps.add(flip, last)
    steps.add(shaped(tuple(result.shape[1:])), last)
    return steps.steps


def _where_largest(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    values, index = x.max(-1)
    return values, index + size * torch.arange(x.shape[2], device=x.device)


WINDOWS: Rows = [
    (_convolution, spelled("conv1d", "conv2d", "conv3d")),
    (_transposed_convolution, spelled("conv_transpose1d", "conv_transpose2d")),
    (_max_pool, spelled("max_pool1d", "max_pool2d", "max_pool1d_with_indices", "max_pool2d_with_indices")),
    (_adaptive_max_pool, spelled("adaptive_max_pool1d", "adaptive_max_pool2d")),
    (_interpolation, [F.interpolate]),
    (_average_pool, spelled("avg_pool2d")),
    (positive, spelled("avg_pool1d", "adaptive_avg_pool1d", "adaptive_avg_pool2d")),
    (partial(_largest, sign=1), spelled("amax")),
    (partial(_largest, sign=-1), spelled("amin")),
    (partial(_largest_with_place, sign=1), spelled("max")),
    (partial(_largest_with_place, sign=-1), spelled("min")),
]
