"""How an ONNX operator is said in torch: a layer or a function for each, written into a graph of torch.fx.

A value of the file is seen at a batch of one. Where its first dimension is that one, the module's value has any
batch in its place; where the file dropped the batch (a vector of 784), the module's value has it in front.
"""

from __future__ import annotations

import math
import operator as python
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn


@dataclass(frozen=True)
class Value:
    """An activation."""

    node: fx.Node
    sample: Tensor
    """What it is for one input of zeros, (1, ...)."""
    batched: bool = True
    """Whether the first dimension in the file is the batch."""

    @property
    def shape(self) -> tuple[int, ...]:
        """In the file, at a batch of one."""
        return tuple(self.sample.shape if self.batched else self.sample.shape[1:])

    def dim(self, axis: int) -> int:
        """The module's dimension of an axis of the file.

        Raises:
            ValueError: it is the batch.
        """
        axis %= len(self.shape)
        if self.batched and axis == 0:
            raise ValueError("it works along the batch")
        return axis if self.batched else axis + 1


class Writer:
    """Writes a module: layers and calls of functions, each tried on the sample."""

    def __init__(self) -> None:
        self.root, self.graph = nn.Module(), fx.Graph()

    def input(self, shape: tuple[int, ...]) -> Value:
        return Value(self.graph.placeholder("x"), torch.zeros(1, *shape))

    def layer(self, name: str, module: nn.Module, value: Value, batched: bool | None = None) -> Value:
        """The value after a layer."""
        while hasattr(self.root, name):
            name += "_"
        self.root.add_module(name, module.eval())
        node = self.graph.call_module(name, (value.node,))
        with torch.no_grad():
            return Value(node, module(value.sample), value.batched if batched is None else batched)

    def function(self, function: Callable[..., Any], *args: Any, batched: bool = True) -> Value:
        """The value of a function of activations and constants; a tensor becomes a buffer."""

        def seen(args: Any, activation: Callable[[Value], Any], tensor: Callable[[Tensor], Any]) -> Any:
            if isinstance(args, list):
                return [seen(arg, activation, tensor) for arg in args]
            if isinstance(args, Value):
                return activation(args)
            return tensor(args) if isinstance(args, Tensor) else args

        symbols = [seen(arg, lambda value: value.node, self._buffer) for arg in args]
        samples = [seen(arg, lambda value: value.sample, lambda tensor: tensor) for arg in args]
        with torch.no_grad():
            sample = function(*samples)
        return Value(self.graph.call_function(function, tuple(symbols)), sample, batched)

    def _buffer(self, tensor: Tensor) -> fx.Node:
        name = f"constant_{len(dict(self.root.named_buffers()))}"
        self.root.register_buffer(name, tensor)
        return self.graph.get_attr(name)

    def reshaped(self, value: Value, shape: tuple[int, ...]) -> Value:
        """In another shape of the file's, at a batch of one."""
        batched = shape[:1] == (1,)
        inner = shape[1:] if batched else shape
        if value.sample.shape[1:] == inner:
            return Value(value.node, value.sample, batched)
        if not inner or value.sample.dim() == 1:
            return self.function(torch.reshape, value, (-1, *inner), batched=batched)
        if value.sample.dim() > 2:
            value = self.layer("flatten", nn.Flatten(), value)
        value = value if len(inner) == 1 else self.layer("unflatten", nn.Unflatten(1, inner), value)
        return Value(value.node, value.sample, batched)

    def module(self, result: Value) -> fx.GraphModule:
        self.graph.output(result.node)
        return fx.GraphModule(self.root, self.graph, "OnnxNetwork")


@dataclass(frozen=True)
class Call:
    """A node of the file on its way into the module."""

    writer: Writer
    name: str
    """For its layer."""
    inputs: list[Any]
    """Values, arrays, and None for what is left out."""
    attributes: dict[str, Any]
    version: int
    """Of the operator set."""
    outputs: int
    uses: list[int]
    """How often each input is read in the whole graph."""

    def get(self, name: str, default: Any = None) -> Any:
        return self.attributes.get(name, default)

    def value(self, place: int = 0) -> Value:
        """The activation at a place among the inputs."""
        found = self.inputs[place] if place < len(self.inputs) else None
        if not isinstance(found, Value):
            raise ValueError(f"its input {place} is a constant, expected an activation")
        return found

    def constant(self, place: int, name: str | None = None, default: Any = None) -> Any:
        """The array at a place among the inputs, or the attribute that older operator sets have instead."""
        found = self.inputs[place] if place < len(self.inputs) else None
        if isinstance(found, Value):
            raise ValueError(f"its input {place} depends on the network's input, expected a constant")
        if found is None and name in self.attributes:
            return np.asarray(self.attributes[name])
        return default if found is None else found

    def weight(self, place: int) -> Tensor | None:
        """A constant in float32."""
        return as_float(found) if (found := self.constant(place)) is not None else None

    def integers(self, place: int, name: str) -> list[int] | None:
        found = self.constant(place, name)
        return None if found is None else [int(number) for number in np.asarray(found).reshape(-1)]

    def layer(self, module: nn.Module, value: Value | None = None) -> Value:
        return self.writer.layer(self.name, module, self.value() if value is None else value)

    def function(self, function: Callable[..., Any], *args: Any) -> Value:
        """Of the first activation and further arguments, on each entry."""
        return self.writer.function(function, self.value(), *args, batched=self.value().batched)


def as_float(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32))


def _parameter(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor.contiguous())


def _of(dims: int, one: Any, two: Any) -> Any:
    if dims not in (1, 2):
        raise ValueError(f"{dims} spatial dimensions have no counterpart, only one or two")
    return one if dims == 1 else two


def _spatial(value: Value) -> int:
    """How many dimensions an image has."""
    if not value.batched:
        raise ValueError(
            f"its input has the shape {value.shape}, with a fixed batch of {value.shape[0]}; export it "
            "with a batch of one"
        )
    return value.sample.dim() - 2


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


def _convolution(call: Call) -> Value:
    value, weight, bias = call.value(), call.weight(1), call.weight(2)
    assert weight is not None
    make: Any = _of(_spatial(value), nn.Conv1d, nn.Conv2d)
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
    layer.weight, layer.bias = _parameter(weight), _parameter(bias)
    return call.layer(layer, value)


def _transposed_convolution(call: Call) -> Value:
    value, weight, bias = call.value(), call.weight(1), call.weight(2)
    assert weight is not None
    make: Any = _of(_spatial(value), nn.ConvTranspose1d, nn.ConvTranspose2d)
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
    layer.weight, layer.bias = _parameter(weight), _parameter(bias)
    return call.layer(layer, value)


def _linear(call: Call, value: Value, weight: Tensor, bias: Tensor | None) -> Value:
    """W x + b over the last dimension."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight, layer.bias = nn.Parameter(weight.contiguous()), _parameter(bias)  # type: ignore[assignment]
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


def _max_pool(call: Call) -> Value:
    dims = _spatial(call.value())
    window = _window(call, call.get("kernel_shape"))
    layer: Any = _of(dims, nn.MaxPool1d, nn.MaxPool2d)
    ceil = _ceils(call, window)
    made = layer(
        tuple(window.kernel), tuple(window.stride), tuple(window.before), tuple(window.dilation), ceil_mode=ceil
    )
    return _cut(call, call.layer(made), window.results)


def _average_pool(call: Call) -> Value:
    value = call.value()
    window = _window(call, call.get("kernel_shape"))
    layer: Any = _of(_spatial(value), nn.AvgPool1d, nn.AvgPool2d)
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
    layer.weight, layer.bias = _parameter(weight), _parameter(bias)  # type: ignore[assignment]
    layer.running_mean, layer.running_var, layer.num_batches_tracked = mean, var, torch.tensor(0)
    return call.layer(layer)


def _flatten(call: Call) -> Value:
    shape = call.value().shape
    axis = call.get("axis", 1)
    axis = axis + len(shape) if axis < 0 else axis
    return call.writer.reshaped(call.value(), (math.prod(shape[:axis]), math.prod(shape[axis:])))


def _reshape(call: Call) -> Value:
    value, wanted = call.value(), call.integers(1, "shape")
    assert wanted is not None
    sizes = [value.shape[place] if n == 0 and not call.get("allowzero", 0) else n for place, n in enumerate(wanted)]
    rest = math.prod(value.shape) // max(1, math.prod(n for n in sizes if n != -1))
    return call.writer.reshaped(value, tuple(rest if n == -1 else n for n in sizes))


def _squeeze(call: Call) -> Value:
    shape, axes = call.value().shape, call.integers(1, "axes")
    gone = {axis % len(shape) for axis in axes} if axes is not None else {i for i, n in enumerate(shape) if n == 1}
    return call.writer.reshaped(call.value(), tuple(n for i, n in enumerate(shape) if i not in gone))


def _unsqueeze(call: Call) -> Value:
    shape, axes = list(call.value().shape), call.integers(1, "axes")
    assert axes is not None
    for axis in sorted(axis % (len(shape) + len(axes)) for axis in axes):
        shape.insert(axis, 1)
    return call.writer.reshaped(call.value(), tuple(shape))


def _transpose(call: Call) -> Value:
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


def _concatenation(call: Call) -> Value:
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


def _gather(call: Call) -> Value:
    axis, indices = call.get("axis", 0), np.asarray(call.constant(1))
    size = call.value().shape[axis]
    if indices.ndim > 1:
        raise ValueError("only a number or a list of numbers selects")
    numbers = [int(i) % size for i in indices.reshape(-1)]
    if call.value().batched and axis % len(call.value().shape) == 0 and numbers == [0]:
        return call.writer.reshaped(call.value(), call.value().shape[1:]) if indices.ndim == 0 else call.value()
    return _selected(call, {axis: numbers[0] if indices.ndim == 0 else numbers})


def _slice(call: Call) -> Value:
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


def _split(call: Call) -> list[Value]:
    value, axis = call.value(), call.get("axis", 0)
    size, sizes = value.shape[axis], call.integers(1, "split")
    if sizes is None:
        each = -(-size // call.outputs)
        sizes = [min(each, size - each * i) for i in range(call.outputs)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [_selected(call, {axis: slice(start, start + n)}) for start, n in zip(starts, sizes, strict=True)]


def _pad(call: Call) -> Value:
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


def _reduced(call: Call, function: Callable[..., Any]) -> Value:
    value, axes = call.value(), call.integers(1, "axes")
    if axes is None and call.get("noop_with_empty_axes", 0):
        return value
    shape, keep = value.shape, call.get("keepdims", 1)
    axes = sorted({axis % len(shape) for axis in (range(len(shape)) if axes is None else axes)})
    inner = [value.dim(axis) for axis in axes if not (value.batched and axis == 0)]  # of the batch there is one
    result = call.writer.function(function, value, inner, True, batched=value.batched) if inner else value
    kept = tuple(n for axis, n in enumerate(result.shape) if axis not in axes)
    return result if keep else call.writer.reshaped(result, kept)


def _softmax(call: Call, layer: Any) -> Value:
    value = call.value()
    axis = call.get("axis", 1 if call.version < 13 else -1) % len(value.shape)
    if call.version < 13 and axis != len(value.shape) - 1 and math.prod(value.shape[axis + 1 :]) != 1:
        flat = call.writer.reshaped(value, (math.prod(value.shape[:axis]), math.prod(value.shape[axis:])))
        return call.writer.reshaped(call.layer(layer(dim=flat.dim(1)), flat), value.shape)
    return call.layer(layer(dim=value.dim(axis)))


def _pooled_whole(call: Call, one: Any, two: Any) -> Value:
    return call.layer(_of(_spatial(call.value()), one, two)(1))


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


def _shape(call: Call) -> Any:
    return np.array(call.value().shape, dtype=np.int64)[slice(call.get("start", 0), call.get("end"))]


OPERATORS: dict[str, Callable[[Call], Any]] = {
    "Abs": lambda call: call.function(torch.abs),
    "Add": lambda call: _of_two(call, python.add),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concatenation,
    "Conv": _convolution,
    "ConvTranspose": _transposed_convolution,
    "Div": lambda call: _of_two(call, python.truediv),
    "Dropout": _dropout,
    "Elu": lambda call: call.layer(nn.ELU(call.get("alpha", 1.0))),
    "Erf": lambda call: call.function(torch.erf),
    "Exp": lambda call: call.function(torch.exp),
    "Flatten": _flatten,
    "Gather": _gather,
    "Gelu": lambda call: call.layer(nn.GELU(call.get("approximate", "none"))),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda call: _pooled_whole(call, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
    "GlobalMaxPool": lambda call: _pooled_whole(call, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
    "HardSwish": lambda call: call.layer(nn.Hardswish()),
    "Identity": lambda call: call.value(),
    "LeakyRelu": _leaky,
    "LogSoftmax": lambda call: _softmax(call, nn.LogSoftmax),
    "MatMul": _matrix_product,
    "Max": lambda call: _several(call, torch.maximum),
    "MaxPool": _max_pool,
    "Min": lambda call: _several(call, torch.minimum),
    "Mul": lambda call: _of_two(call, python.mul),
    "Neg": lambda call: call.function(python.neg),
    "PRelu": _parametric,
    "Pad": _pad,
    "Pow": _power,
    "ReduceMean": lambda call: _reduced(call, torch.mean),
    "ReduceSum": lambda call: _reduced(call, torch.sum),
    "Relu": lambda call: call.layer(nn.ReLU()),
    "Reshape": _reshape,
    "Shape": _shape,
    "Sigmoid": lambda call: call.layer(nn.Sigmoid()),
    "Slice": _slice,
    "Softmax": lambda call: _softmax(call, nn.Softmax),
    "Softplus": lambda call: call.layer(nn.Softplus()),
    "Split": _split,
    "Sqrt": lambda call: call.function(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": lambda call: _of_two(call, python.sub),
    "Sum": lambda call: _several(call, python.add),
    "Tanh": lambda call: call.layer(nn.Tanh()),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
"""What a node becomes, by its type."""
