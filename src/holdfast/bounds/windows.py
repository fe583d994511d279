"""Calls that go over an image in windows: convolution, pooling, interpolation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.bounds.calls import Argument, Call, Rows
from holdfast.bounds.kinds import average_pool_with, max_pool_of
from holdfast.bounds.operators import Affine, Convolution, MaxPool, Operator, UnsupportedOperator, positive


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


def _interpolation(call: Call) -> Operator:
    if "bicubic" in (*call.args, *call.kwargs.values()):
        raise UnsupportedOperator("bicubic interpolation has negative weights, for which there is no rule")
    return positive(call)


def _average_pool(call: Call) -> Operator:
    divisor = call.args[6] if len(call.args) > 6 else call.kwargs.get("divisor_override")
    return average_pool_with(divisor, call)


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


_aten = torch.ops.aten
WINDOWS: Rows = [
    (_conv2d, [F.conv2d, _aten.conv2d.default]),
    (_max_pool, [F.max_pool2d, _aten.max_pool2d.default]),
    (_adaptive_max_pool, [F.adaptive_max_pool2d]),
    (_interpolation, [F.interpolate]),
    (_average_pool, [F.avg_pool2d, _aten.avg_pool2d.default]),
    (positive, [F.adaptive_avg_pool2d, _aten.adaptive_avg_pool2d.default]),
]
