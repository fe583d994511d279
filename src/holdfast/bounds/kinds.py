"""Operators that modules and functions share: activations, pooling, BatchNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.bounds.operators import (
    Affine,
    Elementwise,
    MaxPool,
    Operator,
    Rectifier,
    UnsupportedOperator,
    positive,
)


def scaled_to(x: Tensor, value: Tensor) -> Tensor:
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
    size = (mean * scale).abs()
    size = size if module.bias is None else size + module.bias.abs()
    return Affine(
        lambda x: scaled_to(x, scale) * x + scaled_to(x, shift),
        lambda radius: scaled_to(radius, scale.abs()) * radius,
        entrywise=True,
        offsets=lambda x: scaled_to(x, size)[None],
    )


def leaky(slope: float) -> Operator:
    if slope < 0:
        raise UnsupportedOperator(f"an activation of negative slope {slope} is not monotone")
    if slope <= 1:
        return Rectifier(lambda v: F.leaky_relu(v, slope), (0.0,), 0.0, 1.0, leak=slope)
    return Elementwise(lambda v: F.leaky_relu(v, slope), (0.0,), 0.0, steepest=slope)


def elu(alpha: float) -> Operator:
    if alpha < 0:
        raise UnsupportedOperator(f"an activation of negative slope {alpha} is not monotone")
    return Elementwise(lambda v: F.elu(v, alpha), (0.0,), curvature=alpha, steepest=max(1.0, alpha))


def between(low: float | None, high: float | None) -> Operator:
    kinks = tuple(float(limit) for limit in (low, high) if limit is not None)
    return Elementwise(lambda v: v.clamp(low, high), kinks, 0.0, 1.0)


def gelu(approximate: str = "none") -> Operator:
    turn = {"none": -0.75179152469356446, "tanh": -0.75246142207101626}[approximate]
    return Elementwise(lambda v: F.gelu(v, approximate=approximate), (), 0.82, 1.13, turns=(turn,))


RELU = Rectifier(torch.relu, (0.0,), 0.0, 1.0)
SIGMOID = Elementwise(torch.sigmoid, (), curvature=0.0963, steepest=0.25)
TANH = Elementwise(torch.tanh, (), curvature=0.7699, steepest=1.0)
SILU = Elementwise(F.silu, (), curvature=0.5, steepest=1.1, turns=(-1.2784645427610738,))
ABS = Elementwise(torch.abs, (0.0,), 0.0, 1.0, turns=(0.0,))


def max_pool_of(size: Any, stride: Any, dilation: Any, dims: int, rest: Callable[..., Any]) -> Operator:
    def each(value: Any) -> tuple[int, ...]:
        return (value,) * dims if isinstance(value, int) else tuple(value)

    sizes, dilations = each(size), each(dilation)
    strides = each(stride) if stride else sizes
    overlap = 1
    for k, s, d in zip(sizes, strides, dilations, strict=True):
        overlap *= min(k, -(-((k - 1) * d + 1) // s))
    return MaxPool(lambda x: rest(x)[0], rest, overlap)


def average_pool_with(divisor: int | None, function: Callable[[Tensor], Tensor]) -> Operator:
    if divisor is not None and divisor <= 0:
        raise UnsupportedOperator(f"average pooling with divisor {divisor} has no rule")
    return positive(function)
