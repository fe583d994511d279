"""Calls of functions of single entries: smooth ones, and those of straight pieces beside ReLU."""

from __future__ import annotations

import operator as python
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.bounds.calls import Argument, Call, Rows
from holdfast.bounds.curved import Curved
from holdfast.bounds.kinds import (
    EXP,
    HARDSIGMOID,
    HARDSWISH,
    LOG,
    MISH,
    RECIPROCAL,
    RSQRT,
    SELU,
    SQRT,
    SQUARE,
    celu,
    elu,
    power,
    softplus,
    straight,
)
from holdfast.bounds.operators import Operator, UnsupportedOperator, moved


def _elu(call: Call) -> Operator:
    def rule(
        input: Argument, alpha: float = 1.0, scale: Any = 1.0, input_scale: Any = 1.0, inplace: bool = False
    ) -> Operator:
        # F.elu has ``inplace`` where the exported operator has a scale
        scales = (1.0, 1.0) if isinstance(scale, bool) else (float(scale), float(input_scale))
        return elu(alpha, *scales)

    return rule(*call.args, **call.kwargs)


def _celu(call: Call) -> Operator:
    def rule(input: Argument, alpha: float = 1.0, inplace: bool = False) -> Operator:
        return celu(alpha)

    return rule(*call.args, **call.kwargs)


def _softplus(call: Call) -> Operator:
    def rule(input: Argument, beta: float = 1.0, threshold: float = 20.0) -> Operator:
        return softplus(beta, threshold)

    return rule(*call.args, **call.kwargs)


def _prelu(call: Call) -> Operator:
    def rule(input: Argument, weight: Tensor) -> Operator:
        return prelu(weight, input.value.dim() - 2)

    return rule(*call.args, **call.kwargs)


def prelu(weight: Tensor, behind: int) -> Curved:
    """v above 0 and weight · v below, a weight for each channel.

    Args:
        behind: dimensions behind the channels.
    """
    slope = weight.view(-1, *[1] * max(behind, 0))
    return straight(
        lambda v: torch.where(v > 0, v, slope * v),
        (0.0,),
        lambda v: torch.where(v > 0, torch.ones_like(v), slope),
        max(1.0, float(weight.detach().abs().max())),
        (0.0,),
    )


def power_of(exponent: Any) -> Operator:
    """v ↦ vⁿ for a number n."""
    if not isinstance(exponent, int | float):
        raise UnsupportedOperator("only a power whose exponent is a number has a rule")
    usual = {2.0: SQUARE, 0.5: SQRT, -0.5: RSQRT, -1.0: RECIPROCAL, 1.0: moved(lambda x: x)}
    return usual.get(float(exponent)) or power(float(exponent))


def _power(call: Call) -> Operator:
    def rule(input: Any, exponent: Any) -> Operator:
        if not isinstance(input, Argument):
            raise UnsupportedOperator("a power whose exponent depends on the input has no rule; exp has one")
        return power_of(exponent)

    return rule(*call.args, **call.kwargs)


_aten = torch.ops.aten
ACTIVATIONS: Rows = [
    (lambda call: EXP, [torch.exp, Tensor.exp, _aten.exp.default]),
    (lambda call: LOG, [torch.log, Tensor.log, _aten.log.default]),
    (lambda call: SQRT, [torch.sqrt, Tensor.sqrt, _aten.sqrt.default]),
    (lambda call: RSQRT, [torch.rsqrt, Tensor.rsqrt, _aten.rsqrt.default]),
    (lambda call: SQUARE, [torch.square, Tensor.square, _aten.square.default]),
    (lambda call: RECIPROCAL, [torch.reciprocal, Tensor.reciprocal, _aten.reciprocal.default]),
    (_power, [python.pow, torch.pow, Tensor.pow, _aten.pow.Tensor_Scalar]),
    (lambda call: SELU, [F.selu, torch.selu, _aten.selu.default]),
    (lambda call: HARDSIGMOID, [F.hardsigmoid, _aten.hardsigmoid.default]),
    (lambda call: MISH, [F.mish, _aten.mish.default]),
    (lambda call: HARDSWISH, [F.hardswish, _aten.hardswish.default]),
    (_elu, [F.elu, _aten.elu.default]),
    (_celu, [F.celu, torch.celu, _aten.celu.default]),
    (_softplus, [F.softplus, _aten.softplus.default]),
    (_prelu, [F.prelu, torch.prelu, _aten.prelu.default]),
]

SMOOTH_MODULES: dict[type[nn.Module], Any] = {
    nn.SELU: lambda module: SELU,
    nn.Mish: lambda module: MISH,
    nn.Hardsigmoid: lambda module: HARDSIGMOID,
    nn.Hardswish: lambda module: HARDSWISH,
    nn.CELU: lambda module: celu(module.alpha),
}
