"""ONNX operators that go over an image in windows: convolutions and poolings."""

from __future__ import annotations

import math
import operator as python
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import nn

from holdfast.formats.writing import Call, Value, by_dims, parameter, spatial


@dataclass(frozen=True)
class _Window:
    """Where a kernel goes, per spatial dimension."""

    kernel: list[int]
    stride: list[int]
    dilation: list[int]
    before: list[int]
    """Padding."""
    after: list[int]
    results: list[int]
    """Size of the result."""

    @property
    def padded(self) -> bool:
        return any(self.before + self.after)


def _window(call: Call, kernel: Sequence[int]) -> _Window:
    sizes = call.value().sample.shape[2:]
    stride = list(call.get("strides", [1] * len(kernel)))
    dilation = list(call.get("dilations", [1] * len(kernel)))
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    before, after = _padding(call, sizes, stride, spans)
    results = []
    for n, s, span, p, q in zip(sizes, stride, spans, before, after, strict=True):
        steps = (n + p + q - span) / s
        many = (math.ceil(steps) if call.get("ceil_mode") else math.floor(steps)) + 1
        results.append(many - 1 if call.get("ceil_mode") and (many - 1) * s >= n + p else many)
    return _Window(list(kernel), stride, dilation, before, after, results)


def _padding(call: Call, sizes: Sequence[int], stride: list[int], spans: list[int]) -> tuple[list[int], list[int]]:
    how = call.get("auto_pad", "NOTSET")
    if how in ("NOTSET", "VALID"):
        pads = list(call.get("pads", [0] * 2 * len(sizes))) if how == "NOTSET" else [0] * 2 * len(sizes)
        return pads[: len(sizes)], pads[len(sizes) :]
    whole = [max((-(-n // s) - 1) * s + k - n, 0) for n, s, k in zip(sizes, stride, spans, strict=True)]
    less, more = [n // 2 for n in whole], [n - n // 2 for n in whole]
    return (less, more) if how == "SAME_UPPER" else (more, less)


def _zero_padded(call: Call, value: Value, before: Sequence[int], after: Sequence[int]) -> Value:
    """With zeros around, which may be negative: cut."""
    pads = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
    if len(before) == 2:
        return call.writer.layer(f"{call.name}_pad", nn.ZeroPad2d(tuple(pads)), value)  # type: ignore[arg-type]
    return call.writer.function(F.pad, value, pads, batched=value.batched)


def convolution(call: Call) -> Value:
    value, weight, bias = call.value(), call.weight(1), call.weight(2)
    assert weight is not None
    make: Any = by_dims(spatial(value), nn.Conv1d, nn.Conv2d)
    window, groups = _window(call, weight.shape[2:]), call.get("group", 1)
    even = window.before == window.after
    if not even:
        value = _zero_padded(call, value, window.before, window.after)
    layer = make(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(window.kernel),
        stride=tuple(window.stride),
        padding=tuple(window.before) if even else 0,
        dilation=tuple(window.dilation),
        groups=groups,
        bias=bias is not None,
        device="meta",
    )
    layer.weight, layer.bias = parameter(weight), parameter(bias)
    return call.layer(layer, value)


def transposed_convolution(call: Call) -> Value:
    value, weight, bias = call.value(), call.weight(1), call.weight(2)
    assert weight is not None
    make: Any = by_dims(spatial(value), nn.ConvTranspose1d, nn.ConvTranspose2d)
    dims, groups = weight.dim() - 2, call.get("group", 1)
    pads = call.get("pads", [0] * 2 * dims)
    if (
        call.get("auto_pad", "NOTSET") != "NOTSET"
        or "output_shape" in call.attributes
        or pads[:dims] != pads[dims:]
    ):
        raise ValueError("only a transposed convolution with the same padding on both sides has a counterpart")
    layer = make(
        weight.shape[0],
        weight.shape[1] * groups,
        tuple(weight.shape[2:]),
        stride=tuple(call.get("strides", [1] * dims)),
        padding=tuple(pads[:dims]),
        output_padding=tuple(call.get("output_padding", [0] * dims)),
        dilation=tuple(call.get("dilations", [1] * dims)),
        groups=groups,
        bias=bias is not None,
        device="meta",
    )
    layer.weight, layer.bias = parameter(weight), parameter(bias)
    return call.layer(layer, value)


def max_pool(call: Call) -> Value:
    dims = spatial(call.value())
    window = _window(call, call.get("kernel_shape"))
    layer: Any = by_dims(dims, nn.MaxPool1d, nn.MaxPool2d)
    ceil = _ceils(call, window)
    made = layer(
        tuple(window.kernel), tuple(window.stride), tuple(window.before), tuple(window.dilation), ceil_mode=ceil
    )
    return _cut(call, call.layer(made), window.results)


def average_pool(call: Call) -> Value:
    value = call.value()
    window = _window(call, call.get("kernel_shape"))
    layer: Any = by_dims(spatial(value), nn.AvgPool1d, nn.AvgPool2d)
    if any(d != 1 for d in window.dilation):
        raise ValueError("an average over every other entry (dilations) has no counterpart")
    counted, padding, ceil = bool(call.get("count_include_pad", 0)), window.before, _ceils(call, window)
    if counted and window.before != window.after:
        value, padding = _zero_padded(call, value, window.before, window.after), [0] * len(window.before)
        ceil = bool(call.get("ceil_mode"))
    made = layer(
        tuple(window.kernel), tuple(window.stride), tuple(padding), ceil_mode=ceil, count_include_pad=counted
    )
    return _cut(call, call.layer(made, value), window.results)


def _ceils(call: Call, window: _Window) -> bool:
    """Whether torch's pooling, with the first padding on both sides, makes as many windows only by rounding up."""
    sizes = call.value().sample.shape[2:]
    spans = [d * (k - 1) + 1 for k, d in zip(window.kernel, window.dilation, strict=True)]
    down = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(sizes, window.before, spans, window.stride, strict=True)]
    return any(wanted > found for wanted, found in zip(window.results, down, strict=True))


def _cut(call: Call, value: Value, results: Sequence[int]) -> Value:
    """The first of the windows, as many as the file has."""
    found = list(value.sample.shape[2:])
    if any(have < wanted for have, wanted in zip(found, results, strict=True)):
        raise ValueError("its padding has no counterpart: a window lies in it altogether")
    if found == list(results):
        return value
    cut = (slice(None), slice(None), *(slice(0, n) for n in results))
    return call.writer.function(python.getitem, value, cut)


def pooled_whole(call: Call, one: Any, two: Any) -> Value:
    return call.layer(by_dims(spatial(call.value()), one, two)(1))
