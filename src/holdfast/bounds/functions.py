"""Which operator a traced function call is, by the function."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.bounds.activations import ACTIVATIONS
from holdfast.bounds.arithmetic import ARITHMETIC, limited
from holdfast.bounds.attention import ATTENTION
from holdfast.bounds.calls import SAME, Argument, Call, Lowered, Rows, spelled
from holdfast.bounds.kinds import (
    ABS,
    RELU,
    SIGMOID,
    SILU,
    TANH,
    batch_norm,
    between,
    gelu,
    leaky,
)
from holdfast.bounds.moves import MOVES
from holdfast.bounds.operators import Operator, UnsupportedOperator
from holdfast.bounds.windows import WINDOWS


def _clamp(call: Call) -> Lowered:
    def rule(input: Argument, min: Any = None, max: Any = None) -> Lowered:
        return limited(call, min, max)

    return call.read(rule)


def _hard_tanh(call: Call) -> Lowered:
    def rule(input: Argument, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Operator:
        return between(min_val, max_val)

    return call.read(rule)


def _clamp_below(call: Call) -> Lowered:
    def rule(input: Argument, min: Any) -> Lowered:
        return limited(call, min, None)

    return call.read(rule)


def _clamp_above(call: Call) -> Lowered:
    def rule(input: Argument, max: Any) -> Lowered:
        return limited(call, None, max)

    return call.read(rule)


def _leaky_relu(call: Call) -> Operator:
    slope = call.args[1] if len(call.args) > 1 else call.kwargs.get("negative_slope", 0.01)
    return leaky(slope)


def _gelu_call(call: Call) -> Operator:
    return gelu(call.kwargs.get("approximate", call.args[1] if len(call.args) > 1 else "none"))


def _functional_dropout(call: Call) -> Operator:
    """F.dropout(input, p, training, inplace), torch.dropout(input, p, train) and what torch.export makes of it."""
    named = call.kwargs.get("training", call.kwargs.get("train", True))
    if call.args[2] if len(call.args) > 2 else named:
        raise UnsupportedOperator("it drops in eval mode too; pass training=self.training")
    return SAME


def _functional_batch_norm(call: Call) -> Lowered:
    def rule(
        input: Argument,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Operator:
        return _normalised(weight, bias, running_mean, running_var, training, eps)

    return call.read(rule)


def _torch_batch_norm(call: Call) -> Lowered:
    """As torch.batch_norm and torch.export say it."""

    def rule(
        input: Argument,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool = False,
    ) -> Operator:
        return _normalised(weight, bias, running_mean, running_var, training, eps)

    return call.read(rule)


def _normalised(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, training: bool, eps: float
) -> Operator:
    if training:
        raise UnsupportedOperator("BatchNorm on batch statistics mixes the examples of a batch")
    return batch_norm(SimpleNamespace(weight=weight, bias=bias, eps=eps), mean, var)


_aten = torch.ops.aten
_ACTIVATIONS: Rows = [
    (_functional_batch_norm, [F.batch_norm]),
    (_torch_batch_norm, [torch.batch_norm, _aten.batch_norm]),
    (_clamp_below, spelled("clamp_min", "clamp_min_")),
    (_clamp_above, spelled("clamp_max", "clamp_max_")),
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
    (_functional_dropout, spelled("dropout", "dropout1d", "dropout2d", "alpha_dropout", "feature_dropout")),
    (_clamp, spelled("clamp", "clamp_", "clip", "clip_")),
]
FUNCTIONS: dict[Any, Callable[[Call], Lowered]] = {
    function: rule
    for rows in (ARITHMETIC, MOVES, WINDOWS, ACTIVATIONS, ATTENTION, _ACTIVATIONS)
    for rule, functions in rows
    for function in functions
}
"""Operator of a traced function call, by the function; a method goes by its function in ``torch.Tensor``."""
