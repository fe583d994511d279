"""ONNX operators that move, choose, pad or sum up entries."""

from __future__ import annotations

import math
import operator as python
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from holdfast.formats.writing import Call, Value


def flatten(call: Call) -> Value:
    shape = call.value().shape
    axis = call.get("axis", 1)
    axis = axis + len(shape) if axis < 0 else axis
    return call.writer.reshaped(call.value(), (math.prod(shape[:axis]), math.prod(shape[axis:])))


def reshape(call: Call) -> Value:
    value, wanted = call.value(), call.integers(1, "shape")
    assert wanted is not None
    sizes = [value.shape[place] if n == 0 and not call.get("allowzero", 0) else n for place, n in enumerate(wanted)]
    rest = math.prod(value.shape) // max(1, math.prod(n for n in sizes if n != -1))
    return call.writer.reshaped(value, tuple(rest if n == -1 else n for n in sizes))


def squeeze(call: Call) -> Value:
    shape, axes = call.value().shape, call.integers(1, "axes")
    gone = {axis % len(shape) for axis in axes} if axes is not None else {i for i, n in enumerate(shape) if n == 1}
    return call.writer.reshaped(call.value(), tuple(n for i, n in enumerate(shape) if i not in gone))


def unsqueeze(call: Call) -> Value:
    shape, axes = list(call.value().shape), call.integers(1, "axes")
    assert axes is not None
    for axis in sorted(axis % (len(shape) + len(axes)) for axis in axes):
        shape.insert(axis, 1)
    return call.writer.reshaped(call.value(), tuple(shape))


def transpose(call: Call) -> Value:
    value = call.value()
    order = list(call.get("perm", range(len(value.shape))[::-1]))
    result = tuple(value.shape[axis] for axis in order)
    moved = [axis for axis in order if value.shape[axis] != 1]
    if moved == sorted(moved):  # only dimensions of one change places
        return call.writer.reshaped(value, result)
    if value.batched and order[0] == 0:
        return call.writer.function(torch.permute, value, tuple(order))
    whole = call.writer.function(torch.reshape, value, (-1, *value.shape), batched=False)
    moved_value = call.writer.function(torch.permute, whole, (0, *(axis + 1 for axis in order)), batched=False)
    return call.writer.reshaped(moved_value, result)


def concatenation(call: Call) -> Value:
    values = [call.value(place) for place in range(len(call.inputs))]
    if len({value.batched for value in values}) > 1:
        raise ValueError("some of its inputs have a batch and some have none")
    dim = values[0].dim(call.get("axis", 1))
    return call.writer.function(torch.cat, values, dim, batched=values[0].batched)


def _selected(call: Call, picks: dict[int, Any]) -> Value:
    """Slices or lists of numbers along axes of the file; an integer drops its axis."""
    value = call.value()
    dims = {value.dim(axis): pick for axis, pick in picks.items()}
    result: Value | None = None
    for lists in (False, True):  # two lists in one index would be paired
        chosen = {dim: pick for dim, pick in dims.items() if isinstance(pick, list) is lists}
        for part in [{dim: pick} for dim, pick in chosen.items()] if lists else [chosen] if chosen else []:
            index = tuple(part.get(dim, slice(None)) for dim in range(max(part) + 1))
            result = call.writer.function(python.getitem, result or value, index, batched=value.batched)
    return result or value


def gather(call: Call) -> Value:
    axis, indices = call.get("axis", 0), np.asarray(call.constant(1))
    size = call.value().shape[axis]
    if indices.ndim > 1:
        raise ValueError("only a number or a list of numbers selects")
    numbers = [int(i) % size for i in indices.reshape(-1)]
    if call.value().batched and axis % len(call.value().shape) == 0 and numbers == [0]:
        return call.writer.reshaped(call.value(), call.value().shape[1:]) if indices.ndim == 0 else call.value()
    return _selected(call, {axis: numbers[0] if indices.ndim == 0 else numbers})


def sliced(call: Call) -> Value:
    value = call.value()
    starts, ends = call.integers(1, "starts"), call.integers(2, "ends")
    assert starts is not None
    assert ends is not None
    axes, steps = (
        call.integers(3, "axes") or list(range(len(starts))),
        call.integers(4, "steps") or [1] * len(starts),
    )
    picks: dict[int, Any] = {}
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = value.shape[axis]
        first, last, step = slice(start, end, step).indices(size)
        if (first, last, step) == (0, size, 1):
            continue
        picks[axis] = slice(first, last, step) if step > 0 else list(range(first, last, step))
    return _selected(call, picks)


def split(call: Call) -> list[Value]:
    value, axis = call.value(), call.get("axis", 0)
    size, sizes = value.shape[axis], call.integers(1, "split")
    if sizes is None:
        each = -(-size // call.outputs)
        sizes = [min(each, size - each * i) for i in range(call.outputs)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [_selected(call, {axis: slice(start, start + n)}) for start, n in zip(starts, sizes, strict=True)]


def pad(call: Call) -> Value:
    value, pads, mode = call.value(), call.integers(1, "pads"), call.get("mode", "constant")
    filled = call.constant(2, "value")
    fill = 0.0 if filled is None else float(np.asarray(filled).reshape(()))
    axes = call.integers(3, "axes") or list(range(len(value.shape)))
    assert pads is not None
    sides = {axis % len(value.shape): (pads[i], pads[i + len(axes)]) for i, axis in enumerate(axes)}
    sides = {axis: pair for axis, pair in sides.items() if any(pair)}
    if not sides:
        return value
    dims = {value.dim(axis): pair for axis, pair in sides.items()}
    if mode == "constant" and fill == 0 and value.sample.dim() == 4 and min(dims) >= 2:
        return call.layer(nn.ZeroPad2d((*dims.get(3, (0, 0)), *dims.get(2, (0, 0)))))
    ends = [n for dim in range(value.sample.dim() - 1, min(dims) - 1, -1) for n in dims.get(dim, (0, 0))]
    kind = {"edge": "replicate", "wrap": "circular"}.get(mode, mode)
    rest = (kind, fill) if kind == "constant" else (kind,)
    return call.writer.function(F.pad, value, ends, *rest, batched=value.batched)


def reduced(call: Call, function: Callable[..., Any]) -> Value:
    value, axes = call.value(), call.integers(1, "axes")
    if axes is None and call.get("noop_with_empty_axes", 0):
        return value
    shape, keep = value.shape, call.get("keepdims", 1)
    axes = sorted({axis % len(shape) for axis in (range(len(shape)) if axes is None else axes)})
    inner = [value.dim(axis) for axis in axes if not (value.batched and axis == 0)]  # of the batch there is one
    result = call.writer.function(function, value, inner, True, batched=value.batched) if inner else value
    kept = tuple(n for axis, n in enumerate(result.shape) if axis not in axes)
    return result if keep else call.writer.reshaped(result, kept)


def shape_of(call: Call) -> Any:
    return np.array(call.value().shape, dtype=np.int64)[slice(call.get("start", 0), call.get("end"))]
