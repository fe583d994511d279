"""Operators that modules and functions share: activations, pooling, BatchNorm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.bounds.curved import Bends, Curved, Steep
from holdfast.bounds.operators import (
    Affine,
    Map,
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
    return straight(
        lambda v: F.leaky_relu(v, slope), (0.0,), lambda v: torch.where(v > 0, torch.ones_like(v), slope), slope
    )


def straight(
    function: Map, kinks: tuple[float, ...], derivative: Map, steepest: float, turns: tuple[float, ...] = ()
) -> Curved:
    """A function of straight pieces."""
    return Curved(function, kinks, 0.0, steepest, turns, bends=Bends(derivative, kinks, (0,) * (len(kinks) + 1)))


def elu(alpha: float, scale: float = 1.0, input_scale: float = 1.0) -> Operator:
    """scale · v above 0 and scale · α (exp(v · input_scale) − 1) below."""
    if alpha < 0:
        raise UnsupportedOperator(f"an activation of negative slope {alpha} is not monotone")
    at_zero = scale * alpha * input_scale

    def function(v: Tensor) -> Tensor:
        return scale * torch.where(v > 0, v, alpha * torch.expm1(v.clamp(max=0) * input_scale))

    def derivative(v: Tensor) -> Tensor:
        return torch.where(v > 0, scale, at_zero * (v.clamp(max=0) * input_scale).exp())

    bends = Bends(derivative, (0.0,), (1, 0))
    return Curved(function, (0.0,), at_zero * input_scale, max(scale, at_zero), bends=bends)


def celu(alpha: float) -> Operator:
    if alpha <= 0:
        raise UnsupportedOperator(f"CELU with α = {alpha} has no rule")
    return elu(alpha, input_scale=1 / alpha)


def between(low: float | None, high: float | None) -> Operator:
    kinks = tuple(sorted({float(limit) for limit in (low, high) if limit is not None}))
    return straight(
        lambda v: v.clamp(low, high), kinks, lambda v: (v == v.clamp(low, high)).to(v) if kinks else v * 0 + 1, 1.0
    )


def gelu(approximate: str = "none") -> Operator:
    turn = {"none": -0.75179152469356446, "tanh": -0.75246142207101626}[approximate]
    bend = {"none": math.sqrt(2), "tanh": 1.4185040087908284}[approximate]
    derivative = {"none": _gelu_slope, "tanh": _tanh_gelu_slope}[approximate]
    bends = Bends(derivative, (-bend, bend), (-1, 1, -1))
    return Curved(lambda v: F.gelu(v, approximate=approximate), (), 0.82, 1.13, (turn,), bends=bends)


def _gelu_slope(v: Tensor) -> Tensor:
    return torch.erfc(v / -math.sqrt(2)) / 2 + v * (v.square() / -2).exp() / math.sqrt(2 * math.pi)


def _tanh_gelu_slope(v: Tensor) -> Tensor:
    twice, v = math.sqrt(8 / math.pi), v.clamp(-50, 50)  # beyond it is 0 or 1
    z = twice * (v + 0.044715 * v.pow(3))
    return torch.sigmoid(z) + v * _sigmoid_slope(z) * twice * (1 + 0.134145 * v.square())


def _sigmoid_slope(v: Tensor) -> Tensor:
    return torch.sigmoid(v) * torch.sigmoid(-v)


def _silu_slope(v: Tensor) -> Tensor:
    return torch.sigmoid(v) + v * _sigmoid_slope(v)


def _mish_slope(v: Tensor) -> Tensor:
    t = torch.tanh(F.softplus(v))
    return t + v * torch.sigmoid(v) * (1 - t) * (1 + t)


def softplus(beta: float = 1.0, threshold: float = 20.0) -> Operator:
    if beta <= 0 or threshold < 15:
        raise UnsupportedOperator("softplus jumps down at its threshold; only the usual one, 20, has a rule")

    def exactly(v: Tensor) -> Tensor:  # torch's own is v above its threshold, which float64 can tell from it
        return torch.logaddexp(beta * v, torch.zeros_like(v)) / beta

    bends = Bends(lambda v: torch.sigmoid(beta * v), (), (1,))
    return Curved(exactly, (), curvature=beta / 4, steepest=1.0, bends=bends)


def power(exponent: float) -> Operator:
    """v ↦ vⁿ."""
    n = float(exponent)
    if n in (0.0, 1.0):
        raise UnsupportedOperator(f"a power of exponent {n:g} is no function of its base; leave it out")

    def function(v: Tensor) -> Tensor:
        return v.pow(n)

    def derivative(v: Tensor) -> Tensor:
        return n * v.pow(n - 1)

    rising = 1 if n > 1 or n < 0 else -1
    whole, even = n.is_integer(), n.is_integer() and n % 2 == 0
    least = 0.0 if even or not whole else -math.inf
    return Steep(
        function,
        Bends(derivative, (0.0,) if whole else (), (1 if even else -1, 1) if whole else (rising,)),
        f"the power {n:g}",
        turns=(0.0,) if even and n > 0 else (),
        least=least,
        start=-math.inf if whole else 0.0,
        hole=0.0 if n < 0 else None,
    )


RELU = Rectifier(torch.relu, (0.0,), 0.0, 1.0)
SIGMOID = Curved(torch.sigmoid, (), curvature=0.0963, steepest=0.25, bends=Bends(_sigmoid_slope, (0.0,), (1, -1)))
TANH = Curved(
    torch.tanh, (), 0.7699, steepest=1.0, bends=Bends(lambda v: 4 * _sigmoid_slope(2 * v), (0.0,), (1, -1))
)
SILU = Curved(
    F.silu,
    (),
    curvature=0.5,
    steepest=1.1,
    turns=(-1.2784645427610738,),
    bends=Bends(_silu_slope, (-2.3993572805154677, 2.3993572805154677), (-1, 1, -1)),
)
MISH = Curved(
    F.mish,
    (),
    curvature=0.645,
    steepest=1.09,
    turns=(-1.1924312145154952,),
    bends=Bends(_mish_slope, (-2.2563763963607931, 1.4905711794854285), (-1, 1, -1)),
)
SELU = elu(1.6732632423543772, 1.0507009873554805)
HARDSWISH = Curved(
    F.hardswish,
    (-3.0, 3.0),
    curvature=1 / 3,
    steepest=1.5,
    turns=(-1.5,),
    bends=Bends(
        lambda v: torch.where(v < -3, 0.0, torch.where(v > 3, 1.0, v / 3 + 0.5)).to(v), (-3.0, 3.0), (0, 1, 0)
    ),
)
HARDSIGMOID = straight(F.hardsigmoid, (-3.0, 3.0), lambda v: (v.abs() <= 3).to(v) / 6, 1 / 6)
ABS = straight(torch.abs, (0.0,), torch.sign, 1.0, turns=(0.0,))
EXP = Steep(torch.exp, Bends(torch.exp, (), (1,)), "exp", least=0.0)
LOG = Steep(torch.log, Bends(torch.reciprocal, (), (-1,)), "log", start=0.0, hole=0.0)
RECIPROCAL = Steep(
    torch.reciprocal, Bends(lambda v: -v.reciprocal().square(), (0.0,), (-1, 1)), "the reciprocal", hole=0.0
)
SQUARE = Steep(torch.square, Bends(lambda v: 2 * v, (), (1,)), "the square", turns=(0.0,), least=0.0)
SQRT = Steep(torch.sqrt, Bends(lambda v: v.rsqrt() / 2, (), (-1,)), "sqrt", least=0.0, start=0.0)
RSQRT = Steep(
    torch.rsqrt, Bends(lambda v: -v.rsqrt().pow(3) / 2, (), (1,)), "rsqrt", least=0.0, start=0.0, hole=0.0
)


def transposed_convolution(weight: Tensor, bias: Tensor | None, rest: Sequence[Any]) -> Operator:
    """In one or two dimensions; the rest is stride, padding, output padding, groups, dilation."""
    if weight.dim() not in (3, 4):
        raise UnsupportedOperator(f"a transposed convolution in {weight.dim() - 2} dimensions has no rule")
    function: Any = F.conv_transpose1d if weight.dim() == 3 else F.conv_transpose2d
    return Affine(
        lambda x: function(x, weight, bias, *rest),
        lambda radius: function(radius, weight.abs(), None, *rest),
        summands=max(weight[0].numel(), weight[:, 0].numel()),
        offsets=None if bias is None else lambda x: scaled_to(x, bias.abs())[None],
    )


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
