"""Receptive fields: what neurons at one position of a map read of every value before it.

A window: so many rows and columns, from a place that moves with the position by a stride. Where windows cover the
map, where those of two readers move differently, or an operator has no geometry, a value is read whole.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from holdfast.bounds.operators import (
    Affine,
    Concatenate,
    Convolution,
    Elementwise,
    Graph,
    MaxPool,
    PairwiseMax,
    Shape,
    Sum,
    outside_inference_mode,
)
from holdfast.bounds.relaxation import Lines, Relaxation, SortedPairs, Winners

Pair = tuple[int, int]

Channels = dict[int, tuple[Tensor, Tensor] | None]
"""By the number of an affine node that acts channel by channel: factor and bias, (C,) each; None for others."""

CUT = (Lines, SortedPairs, Winners)
"""The relaxations that can be cut to windows (see ``holdfast.bounds.patches.cropped``)."""


@dataclass(frozen=True)
class Window:
    """Rows and columns stride · position + start, and so many from there; rows first."""

    stride: Pair
    start: Pair
    size: Pair

    def before(self, size: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Window:
        """What windows of an operator read for this one of its result."""
        axes = range(2)
        return Window(
            _pair(self.stride[i] * stride[i] for i in axes),
            _pair(self.start[i] * stride[i] - padding[i] for i in axes),
            _pair((self.size[i] - 1) * stride[i] + dilation[i] * (size[i] - 1) + 1 for i in axes),
        )

    def with_(self, other: Window) -> Window | None:
        """The least that holds both, if they move alike."""
        if self.stride != other.stride:
            return None
        axes = range(2)
        start = _pair(min(self.start[i], other.start[i]) for i in axes)
        ends = _pair(max(self.start[i] + self.size[i], other.start[i] + other.size[i]) for i in axes)
        return Window(self.stride, start, _pair(ends[i] - start[i] for i in axes))


def _pair(values: Any) -> Pair:
    first, second = values
    return int(first), int(second)


@dataclass(frozen=True)
class Plan:
    """How neurons of one value are read, backward."""

    graph: Graph
    source: int
    """The number of the value that passes begin with."""
    windows: dict[int, Window]
    """By the number of the value; a value that is held whole has none."""
    parts: dict[tuple[int, int], Window]
    """What an operator (its number) asks of its inputs, one by one."""
    readers: dict[int, int]
    """How many of a value's inputs to operators are on the way from the source."""
    relaxations: dict[int, Relaxation]
    """By the number of the node."""
    channels: Channels
    padded: dict[tuple[int, Window], tuple[Tensor, Tensor]]
    """Tensors that were cut, by their ``id``, and all their windows."""

    @classmethod
    def of(
        cls,
        graph: Graph,
        source: int,
        relaxations: dict[int, Relaxation],
        channels: Channels,
        like: Tensor,
    ) -> Plan:
        plan = cls(graph, source, {}, {}, {}, relaxations, channels, {})
        if len(graph.shape(source)) == 3:
            plan.windows[source] = Window((1, 1), (0, 0), (1, 1))
        asked: dict[int, list[Window | None]] = {source: []}
        for number in range(source - 1, -1, -1):
            plan._step(number, asked, like)
        if asked.get(0):
            plan._settle(0, asked[0])
        return plan

    def _step(self, number: int, asked: dict[int, list[Window | None]], like: Tensor) -> None:
        node = self.graph.nodes[number]
        if number + 1 not in asked:
            return
        if number + 1 != self.source:
            self._settle(number + 1, asked[number + 1])
        window, found = self.windows.get(number + 1), None
        if window is not None:
            found = self._before(number, window, like)
            if found is None:
                del self.windows[number + 1]
        for place, source in enumerate(node.inputs):
            asked.setdefault(source, []).append(found)
            self.readers[source] = len(asked[source])
            if found is not None:
                self.parts[number, place] = found

    def _settle(self, value: int, asked: list[Window | None]) -> None:
        """The window of a value from what its readers ask; whole where they differ, or it saves too little."""
        window = asked[0]
        for other in asked[1:]:
            window = window and other and window.with_(other)
        shape = self.graph.shape(value)
        if window is not None and 4 * math.prod(window.size) <= 3 * math.prod(shape[1:]):
            self.windows[value] = window

    def _before(self, number: int, window: Window, like: Tensor) -> Window | None:
        node = self.graph.nodes[number]
        operator, shape = node.operator, self.graph.shape(node.inputs[0])
        if number in self.relaxations and type(self.relaxations[number]) not in CUT:
            return None
        if isinstance(operator, Convolution) and len(operator.stride) == 2:
            size = _pair(operator.weight.shape[2:])
            return window.before(size, _pair(operator.stride), _pair(operator.padding), _pair(operator.dilation))
        if isinstance(operator, MaxPool) and len(shape) == 3:
            geometry = pool_geometry(operator, shape, like)
            return geometry and window.before(geometry[0], geometry[1], geometry[2], (1, 1))
        alike = isinstance(operator, Sum | Elementwise | PairwiseMax)
        alike = alike or (isinstance(operator, Concatenate) and operator.dim == 1)
        if isinstance(operator, Affine) and operator.entrywise and shape == node.shape:
            if number not in self.channels:
                self.channels[number] = by_channel(operator, shape, like)
            alike = self.channels[number] is not None
        return window if alike else None

    @cached_property
    def width(self) -> int:
        """The most entries that a pass holds for each of its functions."""
        return max(self._entries(value) for value in range(self.source + 1))

    def _entries(self, value: int) -> int:
        shape, window = self.graph.shape(value), self.windows.get(value)
        return math.prod(shape) if window is None else shape[0] * math.prod(window.size)


def by_channel(operator: Affine, shape: Shape, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """Factor and bias of each channel (C,), if an affine operator on a map (C, H, W) scales and shifts them."""
    with outside_inference_mode():
        ones = like.new_ones(1, *shape)
        apart = torch.arange(1, ones.numel() + 1, device=like.device).to(like).view_as(ones)
    factor, shift, moved = (
        operator.adjoint(ones, shape),
        operator.bias(like, shape).expand_as(ones),
        operator.adjoint(apart, shape),
    )
    w, b = factor[0, :, 0, 0], shift[0, :, 0, 0]
    alike = (factor == w[:, None, None]).all() & (shift == b[:, None, None]).all()
    near = 8 * torch.finfo(like.dtype).eps * moved.abs()
    if alike and ((moved - w[:, None, None] * apart).abs() <= near).all():
        return w, b
    return None


def pool_geometry(operator: MaxPool, shape: Shape, like: Tensor) -> tuple[Pair, Pair, Pair] | None:
    """Extent, stride and padding of the windows, if all of them are alike but for the borders of the map.

    The largest of ascending entries is a window's last, that of descending ones its first.
    """
    _, height, width = shape
    rising = torch.arange(height * width, dtype=torch.float64, device=like.device).to(like.dtype)
    if rising[-1] != height * width - 1:  # the type does not tell them apart
        return None
    rising = rising.view(1, 1, height, width)
    first, last = (operator.where(ramp)[1][0, 0] for ramp in (-rising, rising))
    ends = []
    for index, divide in ((0, width), (1, 1)):
        begin, end = (t.select(1 - index, 0) // divide % (height if index == 0 else width) for t in (first, last))
        found = _axis(begin.tolist(), end.tolist(), height if index == 0 else width)
        if found is None:
            return None
        ends.append(found)
    rows, columns = (torch.arange(n, device=like.device) for n in first.shape)
    expected = []
    for (size, stride, padding), n, count in zip(ends, (height, width), (rows, columns), strict=True):
        start = count * stride - padding
        expected.append((start.clamp(min=0), (start + size - 1).clamp(max=n - 1)))
    (top, bottom), (left, right) = expected
    alike = torch.equal(first, top[:, None] * width + left) and torch.equal(last, bottom[:, None] * width + right)
    sizes, strides, paddings = (_pair(end[i] for end in ends) for i in range(3))
    return (sizes, strides, paddings) if alike else None


def _axis(begin: list[int], end: list[int], length: int) -> tuple[int, int, int] | None:
    """Size, stride and padding of windows along an axis, the ends of which are known."""
    size = max(e - b + 1 for b, e in zip(begin, end, strict=True))
    if len(begin) == 1:
        return size, 1, -begin[0]
    inner = [b for b, e in zip(begin, end, strict=True) if e - b + 1 == size]
    strides = {after - before for before, after in itertools.pairwise(inner)}
    if len(strides) > 1 or (not strides and begin[0] == 0 and end[0] - begin[0] + 1 < size):
        return None
    stride = strides.pop() if strides else begin[1] - begin[0]
    place = next(i for i, (b, e) in enumerate(zip(begin, end, strict=True)) if e - b + 1 == size)
    return size, stride, place * stride - begin[place]
