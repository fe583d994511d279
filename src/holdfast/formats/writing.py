"""A module in the making: what a node of an ONNX file reads, and how its layer or function is written down.

A value of the file is seen at a batch of one. Where its first dimension is that one, the module's value has any
batch in its place; where the file dropped the batch (a vector of 784), the module's value has it in front.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
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


def parameter(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor.contiguous())


def by_dims(dims: int, one: Any, two: Any) -> Any:
    if dims not in (1, 2):
        raise ValueError(f"{dims} spatial dimensions have no counterpart, only one or two")
    return one if dims == 1 else two


def spatial(value: Value) -> int:
    """How many dimensions an image has."""
    if not value.batched:
        raise ValueError(
            f"its input has the shape {value.shape}, with a fixed batch of {value.shape[0]}; export it "
            "with a batch of one"
        )
    return value.sample.dim() - 2
