"""How an ONNX operator is said in torch: a layer or a function for each, by its type."""

from __future__ import annotations

import math
import operator as python
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from holdfast.formats.shapes import (
    concatenation,
    flatten,
    gather,
    pad,
    reduced,
    reshape,
    shape_of,
    sliced,
    split,
    squeeze,
    transpose,
    unsqueeze,
)
from holdfast.formats.windows import average_pool, convolution, max_pool, pooled_whole, transposed_convolution
from holdfast.formats.writing import Call, Value, as_float, parameter


def _linear(call: Call, value: Value, weight: Tensor, bias: Tensor | None) -> Value:
    """W x + b over the last dimension."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight, layer.bias = nn.Parameter(weight.contiguous()), parameter(bias)  # type: ignore[assignment]
    return call.layer(layer, value)


def _gemm(call: Call) -> Value:
    value, weight, bias = call.value(), call.weight(1), call.weight(2)
    assert weight is not None
    if call.get("transA", 0):
        raise ValueError("an activation that is transposed (transA) has no counterpart")
    weight = call.get("alpha", 1.0) * (weight if call.get("transB", 0) else weight.T)
    if bias is not None:
        if bias.numel() not in (1, len(weight)) or (bias.dim() and bias.shape[-1] not in (1, len(weight))):
            raise ValueError(f"its addend of shape {tuple(bias.shape)} is no bias")
        bias = call.get("beta", 1.0) * bias.reshape(-1).expand(len(weight))
    return _linear(call, value, weight, bias)


def _matrix_product(call: Call) -> Value:
    first, second = call.inputs
    if isinstance(first, Value) and isinstance(second, Value):
        return _of_two(call, torch.matmul)
    if isinstance(first, Value):
        matrix = as_float(second)
        matrix = matrix[:, None] if matrix.dim() == 1 else matrix
        if matrix.dim() != 2:
            raise ValueError(f"a constant of shape {tuple(matrix.shape)} is no matrix")
        value = _linear(call, first, matrix.T, None)
        return call.writer.reshaped(value, first.shape[:-1]) if np.ndim(second) == 1 else value
    matrix, shape = as_float(first), second.shape
    if matrix.dim() != 2 or len(shape) not in (1, 2) or (len(shape) == 2 and shape[1] != 1):
        raise ValueError("a constant from the left multiplies a column alone")
    value = _linear(call, call.writer.reshaped(second, (1, shape[0])), matrix, None)
    return call.writer.reshaped(value, (len(matrix), *shape[1:]))


def _bias_taken_in(call: Call, value: Value, constant: Tensor) -> Value | None:
    """The value where the layer before it is dense, without a bias, and can take the constant as one."""
    place = next(place for place, found in enumerate(call.inputs) if found is value)
    layer = call.writer.root.get_submodule(str(value.node.target)) if value.node.op == "call_module" else None
    if not isinstance(layer, nn.Linear) or layer.bias is not None or call.uses[place] != 1:
        return None
    if constant.numel() not in (1, layer.out_features) or (
        constant.dim() and constant.shape[-1] != constant.numel()
    ):
        return None
    if constant.dim() > len(value.shape):
        return None
    bias = constant.reshape(-1).expand(layer.out_features).clone()
    layer.bias = nn.Parameter(bias)
    return Value(value.node, value.sample + bias, value.batched)


def _of_two(call: Call, function: Callable[..., Any]) -> Value:
    """A function of two arguments that broadcast, as the file's shapes do."""
    pair = [each if isinstance(each, Value) else as_float(each) for each in call.inputs]
    if function in (python.add, python.sub) and isinstance(pair[0], Value) and isinstance(pair[1], Tensor):
        taken = _bias_taken_in(call, pair[0], pair[1] if function is python.add else -pair[1])
        if taken:
            return taken
    if function is python.add and isinstance(pair[1], Value) and isinstance(pair[0], Tensor):
        taken = _bias_taken_in(call, pair[1], pair[0])
        if taken:
            return taken
    rank = max(len(each.shape) for each in pair)
    shapes = [(1,) * (rank - len(each.shape)) + tuple(each.shape) for each in pair]
    batched = all(shape[:1] == (1,) for shape in shapes)
    ready: list[Any] = []
    for each, shape in zip(pair, shapes, strict=True):
        if isinstance(each, Tensor):
            ready.append(float(each) if each.numel() == 1 else each.reshape(shape[1:] if batched else shape))
            continue
        each = call.writer.reshaped(each, shape)
        if each.batched and not batched:  # the file broadcasts its first dimension
            each = call.writer.layer("unflatten", nn.Unflatten(1, (1, shape[1])), each, False)
        ready.append(each)
    return call.writer.function(function, *ready, batched=batched)


def _several(call: Call, function: Callable[..., Any]) -> Value:
    """Max, Min and Sum, of one or two."""
    if len(call.inputs) > 2:
        raise ValueError("only two arguments have a counterpart")
    if len(call.inputs) == 1:
        return call.value()
    numbers = [np.asarray(each).reshape(-1) for each in call.inputs if not isinstance(each, Value)]
    if function is python.add or not numbers or len(numbers[0]) > 1:
        return _of_two(call, function)
    value, limit = next(each for each in call.inputs if isinstance(each, Value)), float(numbers[0][0])
    return _between(call, value, *((limit, None) if function is torch.maximum else (None, limit)))


def _between(call: Call, value: Value, low: float | None, high: float | None) -> Value:
    if low is None and high is None:
        return value
    if low == 0 and high is None:
        return call.layer(nn.ReLU(), value)
    if low is not None and high is not None:
        return call.layer(nn.Hardtanh(low, high), value)
    return call.writer.function(torch.clamp, value, low, high, batched=value.batched)


def _clip(call: Call) -> Value:
    low, high = call.constant(1, "min"), call.constant(2, "max")
    ends = [
        None if end is None or not np.isfinite(end).all() else float(np.asarray(end).reshape(()))
        for end in (low, high)
    ]
    return _between(call, call.value(), *ends)


def _batch_norm(call: Call) -> Value:
    value = call.value()
    if call.get("training_mode", 0) or not call.get("spatial", 1):
        raise ValueError("batch statistics have no counterpart; export the network in eval mode")
    weight, bias, mean, var = (call.weight(place) for place in (1, 2, 3, 4))
    assert mean is not None
    if not value.batched:
        raise ValueError("the batch was dropped before it")
    layer = (nn.BatchNorm2d if value.sample.dim() == 4 else nn.BatchNorm1d)(
        len(mean), eps=call.get("epsilon", 1e-5), device="meta"
    )
    layer.weight, layer.bias = parameter(weight), parameter(bias)  # type: ignore[assignment]
    layer.running_mean, layer.running_var, layer.num_batches_tracked = mean, var, torch.tensor(0)
    return call.layer(layer)


def _softmax(call: Call, layer: Any) -> Value:
    value = call.value()
    axis = call.get("axis", 1 if call.version < 13 else -1) % len(value.shape)
    if call.version < 13 and axis != len(value.shape) - 1 and math.prod(value.shape[axis + 1 :]) != 1:
        flat = call.writer.reshaped(value, (math.prod(value.shape[:axis]), math.prod(value.shape[axis:])))
        return call.writer.reshaped(call.layer(layer(dim=flat.dim(1)), flat), value.shape)
    return call.layer(layer(dim=value.dim(axis)))


def _power(call: Call) -> Value:
    exponent = np.asarray(call.constant(1)).reshape(-1)
    if len(exponent) != 1:
        raise ValueError("only one exponent for all entries has a counterpart")
    if exponent[0] == 1:
        return call.value()
    return call.function(torch.pow, float(exponent[0]))


def _leaky(call: Call) -> Value:
    return call.layer(nn.LeakyReLU(call.get("alpha", 0.01)))


def _parametric(call: Call) -> Value:
    slopes = np.asarray(call.constant(1)).reshape(-1)
    if not (slopes == slopes[0]).all():
        raise ValueError("only one slope for all channels has a counterpart")
    return call.layer(nn.LeakyReLU(float(slopes[0])))


def _cast(call: Call) -> Value:
    from onnx import TensorProto

    if call.get("to") not in (TensorProto.FLOAT, TensorProto.DOUBLE):
        raise ValueError("an activation is float32 here, and nothing else")
    return call.value()


def _dropout(call: Call) -> Value:
    training = call.constant(2)
    if training is not None and bool(np.asarray(training).reshape(())):
        raise ValueError("it drops in eval mode too; export the network in eval mode")
    return call.value()


OPERATORS: dict[str, Callable[[Call], Any]] = {
    "Abs": lambda call: call.function(torch.abs),
    "Add": lambda call: _of_two(call, python.add),
    "AveragePool": average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": concatenation,
    "Conv": convolution,
    "ConvTranspose": transposed_convolution,
    "Div": lambda call: _of_two(call, python.truediv),
    "Dropout": _dropout,
    "Elu": lambda call: call.layer(nn.ELU(call.get("alpha", 1.0))),
    "Erf": lambda call: call.function(torch.erf),
    "Exp": lambda call: call.function(torch.exp),
    "Flatten": flatten,
    "Gather": gather,
    "Gelu": lambda call: call.layer(nn.GELU(call.get("approximate", "none"))),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda call: pooled_whole(call, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
    "GlobalMaxPool": lambda call: pooled_whole(call, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
    "HardSwish": lambda call: call.layer(nn.Hardswish()),
    "Identity": lambda call: call.value(),
    "LeakyRelu": _leaky,
    "LogSoftmax": lambda call: _softmax(call, nn.LogSoftmax),
    "MatMul": _matrix_product,
    "Max": lambda call: _several(call, torch.maximum),
    "MaxPool": max_pool,
    "Min": lambda call: _several(call, torch.minimum),
    "Mul": lambda call: _of_two(call, python.mul),
    "Neg": lambda call: call.function(python.neg),
    "PRelu": _parametric,
    "Pad": pad,
    "Pow": _power,
    "ReduceMean": lambda call: reduced(call, torch.mean),
    "ReduceSum": lambda call: reduced(call, torch.sum),
    "Relu": lambda call: call.layer(nn.ReLU()),
    "Reshape": reshape,
    "Shape": shape_of,
    "Sigmoid": lambda call: call.layer(nn.Sigmoid()),
    "Slice": sliced,
    "Softmax": lambda call: _softmax(call, nn.Softmax),
    "Softplus": lambda call: call.layer(nn.Softplus()),
    "Split": split,
    "Sqrt": lambda call: call.function(torch.sqrt),
    "Squeeze": squeeze,
    "Sub": lambda call: _of_two(call, python.sub),
    "Sum": lambda call: _several(call, python.add),
    "Tanh": lambda call: call.layer(nn.Tanh()),
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
}
"""What a node becomes, by its type."""
