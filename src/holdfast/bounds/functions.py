"""Which operator a traced function call is, by the function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.bounds.activations import ACTIVATIONS
from holdfast.bounds.arithmetic import ARITHMETIC
from holdfast.bounds.attention import ATTENTION
from holdfast.bounds.calls import Argument, Call, Rows
from holdfast.bounds.kinds import ABS, RELU, SIGMOID, SILU, TANH, batch_norm, between, gelu, leaky
from holdfast.bounds.moves import MOVES
from holdfast.bounds.operators import Operator, UnsupportedOperator, moved
from holdfast.bounds.windows import WINDOWS


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


def _leaky_relu(call: Call) -> Operator:
    slope = call.args[1] if len(call.args) > 1 else call.kwargs.get("negative_slope", 0.01)
    return leaky(slope)


def _gelu_call(call: Call) -> Operator:
    return gelu(call.kwargs.get("approximate", call.args[1] if len(call.args) > 1 else "none"))


def _functional_dropout(call: Call) -> Operator:
    if call.args[2] if len(call.args) > 2 else call.kwargs.get("training", True):
        raise UnsupportedOperator("it drops in eval mode too; pass training=self.training")
    return moved(lambda x: x)


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
_ACTIVATIONS: Rows = [
    (_export_batch_norm, [_aten.batch_norm.default]),
    (_leaky_relu, [F.leaky_relu, _aten.leaky_relu.default, _aten.leaky_relu_.default]),
    (lambda call: RELU, [F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_]),
    (lambda call: RELU, [_aten.relu.default, _aten.relu_.default]),
    (lambda call: SIGMOID, [F.sigmoid, torch.sigmoid, Tensor.sigmoid, _aten.sigmoid.default]),
    (lambda call: TANH, [F.tanh, torch.tanh, Tensor.tanh, _aten.tanh.default]),
    (lambda call: SILU, [F.silu, _aten.silu.default, _aten.silu_.default]),
    (lambda call: ABS, [abs, torch.abs, Tensor.abs, _aten.abs.default]),
    (lambda call: between(0.0, 6.0), [F.relu6, _aten.relu6.default]),
    (_hard_tanh, [F.hardtanh, _aten.hardtanh.default, _aten.hardtanh_.default]),
    (_gelu_call, [F.gelu, _aten.gelu.default]),
    (_functional_dropout, [F.dropout, F.dropout2d, _aten.dropout.default]),
    (_clamp, [torch.clamp, Tensor.clamp, torch.clip, Tensor.clip, _aten.clamp.default]),
]
FUNCTIONS: dict[Any, Callable[[Call], Operator]] = {
    function: rule
    for rows in (ARITHMETIC, MOVES, WINDOWS, ACTIVATIONS, ATTENTION, _ACTIVATIONS)
    for rule, functions in rows
    for function in functions
}
"""Operator of a traced function call, by the function; a method goes by its function in ``torch.Tensor``."""
