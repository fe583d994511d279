"""CROWN by receptive field: a backward pass from neurons of a convolution moves patches, not maps.

Coefficients of a value that is read in windows are held as patches (P, S, C, h, w), 0 where a window leaves the
map. Relaxations, costs and the region are cut to the windows; in all else the pass is the same.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property, singledispatch
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.bounds.fields import Plan, Window
from holdfast.bounds.interval import Interval
from holdfast.bounds.operators import (
    Affine,
    Concatenate,
    Convolution,
    Graph,
    Linear,
    Operator,
    Shape,
    Sum,
)
from holdfast.bounds.region import Ball, Box, Region
from holdfast.bounds.relaxation import Lines, Relaxation, SortedPairs, Winners
from holdfast.bounds.rounding import Cost


@singledispatch
def split(operator: Operator, a: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Coefficients of an operator's inputs from coefficients (N, S, ...) of its result; exact ones only."""
    raise TypeError(f"{type(operator).__name__} has no exact backward rule")


@split.register
def _(operator: Affine, a: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    return [operator.adjoint(a.flatten(0, 1), shapes[0]).view(*a.shape[:2], *shapes[0])]


@split.register
def _(operator: Sum, a: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    return [a, operator.sign * a]


@split.register
def _(operator: Concatenate, a: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    return list(a.split([shape[operator.dim - 1] for shape in shapes], operator.dim + 1))


class Maps:
    """A pass whose coefficients are of whole values, (N, S, ...) for the N examples there are."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def parts(self, number: int, a: Tensor) -> list[Tensor]:
        """Coefficients of an exact operator's inputs from those of its result."""
        node = self.graph.nodes[number]
        return split(node.operator, a, [self.graph.shape(source) for source in node.inputs])

    def biases(self, number: int, a: Tensor) -> Tensor:
        """What the bias of an affine operator adds, (N, S)."""
        node = self.graph.nodes[number]
        shape = self.graph.shape(node.inputs[0])
        assert isinstance(node.operator, Affine)
        if isinstance(node.operator, Linear) and len(shape) == 1:
            bias = node.operator.constant
            return a.new_zeros(a.shape[:2]) if bias is None else a @ bias
        return a.flatten(2) @ node.operator.bias(a, shape).flatten()

    def fitted(self, number: int, argument: int, part: Tensor) -> Tensor:
        """A part as coefficients of that value are held."""
        return part


class Patches(Maps):
    """A pass from neurons at P positions, each of one example: coefficients (P, S, ...), patches where there are
    windows.

    Args:
        owner: the example of each, (P,).
        position: (P,) of the flat map of the plan's value, where that has windows.
        channel: the neurons there, or of the flat value, (P, S); functions are these and their negatives.
    """

    def __init__(self, plan: Plan, owner: Tensor, position: Tensor, channel: Tensor) -> None:
        super().__init__(plan.graph)
        self.plan, self.owner, self.position = plan, owner, position
        self.channel = torch.cat([channel, channel], 1)
        self._masks: dict[tuple[Window, Shape], Tensor | None] = {}
        """By the window and the size of the map that it is on."""
        self._hot: dict[int, Tensor] = {}
        """By the number of the value, coefficients (P, 2 S) where they are of one entry of the channel each."""

    def start(self, like: Tensor) -> Tensor:
        """The functions v and −v, (P, 2 S, ...)."""
        signs = torch.ones_like(self.channel).to(like)
        signs[:, signs.shape[1] // 2 :] = -1
        self._hot = {self.plan.source: signs}
        shape = self._shape
        entries = shape[0] if self.plan.source in self.plan.windows else math.prod(shape)
        one = like.new_zeros(*self.channel.shape, entries).scatter(2, self.channel[:, :, None], signs[:, :, None])
        return one.view(*signs.shape, *((entries, 1, 1) if self.plan.source in self.plan.windows else shape))

    def parts(self, number: int, a: Tensor) -> list[Tensor]:
        node, hot = self.graph.nodes[number], self._hot.get(number + 1)
        operator, windowed = node.operator, number + 1 in self.plan.windows
        channels = self.plan.channels.get(number) if windowed else None
        if hot is not None:
            self._pass_on(number, hot, channels)
        if hot is not None and isinstance(operator, Linear) and a.dim() == 3:
            return [operator.weight[self.channel] * hot[:, :, None]]
        if channels is not None:
            return [a * channels[0][:, None, None]]
        if not windowed or not isinstance(operator, Convolution):
            return super().parts(number, a)
        if hot is not None and operator.groups == 1 and set(operator.dilation) == {1}:
            pulled = operator.weight[self.channel] * hot[:, :, None, None, None]
        else:
            function, rest = F.conv_transpose2d, (operator.stride, 0, 0, operator.groups, operator.dilation)
            pulled = function(a.flatten(0, 1), operator.weight, None, *rest).unflatten(0, a.shape[:2])
        mask = None if self._kept_inside(node.inputs[0]) else self._mask(number)
        return [pulled if mask is None else pulled * mask]

    def _pass_on(self, number: int, hot: Tensor, channels: tuple[Tensor, Tensor] | None) -> None:
        """One entry of the inputs alone is read, too, where an operator keeps entries apart."""
        node = self.graph.nodes[number]
        signs = (1, node.operator.sign) if isinstance(node.operator, Sum) else (1,) if channels else ()
        for source, sign in zip(node.inputs, signs, strict=False):
            if self.plan.readers.get(source) == 1:
                self._hot[source] = sign * hot if channels is None else hot * channels[0][self.channel]

    def _kept_inside(self, value: int) -> bool:
        """Whether what is next to read coefficients of a value takes those outside the map for 0."""
        return value in self.plan.windows and value > 0 and isinstance(self.plan.relaxations.get(value - 1), Lines)

    def biases(self, number: int, a: Tensor) -> Tensor:
        if number + 1 not in self.plan.windows:
            return super().biases(number, a)
        operator = self.graph.nodes[number].operator
        channels = self.plan.channels.get(number)
        bias = channels[1] if channels else operator.constant if isinstance(operator, Convolution) else None
        return a.new_zeros(a.shape[:2]) if bias is None else a.sum((3, 4)) @ bias

    def fitted(self, number: int, argument: int, part: Tensor) -> Tensor:
        value = self.graph.nodes[number].inputs[argument]
        natural, window = self.plan.parts.get((number, argument)), self.plan.windows.get(value)
        if natural is None or natural == window:
            return part
        if window is None:
            return self._whole(part, natural, self.graph.shape(value))
        pads = []
        for i in (1, 0):
            before = natural.start[i] - window.start[i]
            pads += [before, window.size[i] - natural.size[i] - before]
        return F.pad(part, pads)

    def cut(self, value: int, tensor: Tensor) -> Tensor:
        """What a tensor of a value for each of N examples, or of channels of the same map, is for each of the P:
        (P, C, h, w), 0 outside the map; the whole (P, ...) where there is no window."""
        if (window := self.plan.windows.get(value)) is None:
            return tensor[self.owner]
        corner, every = [], self._every(value, window, tensor)
        for i, place in enumerate(self._places):
            corner.append(place * window.stride[i] + max(0, window.start[i]))
        return every[self.owner, :, corner[0], corner[1]]

    def _every(self, value: int, window: Window, tensor: Tensor) -> Tensor:
        """All windows of a tensor, padded by what they reach beyond the map: (N, C, rows, columns, h, w)."""
        known = self.plan.padded.get(key := (id(tensor), window))
        if known is None or known[0] is not tensor:
            shape = self.graph.shape(value)[1:]
            maps, pads = tensor.reshape(len(tensor), -1, *shape), []
            for i in (1, 0):
                end = window.stride[i] * (self._shape[1 + i] - 1) + window.start[i] + window.size[i]
                pads += [max(0, -window.start[i]), max(0, end - shape[i])]
            padded = F.pad(maps, pads) if any(pads) else maps
            every = padded.unfold(2, window.size[0], 1).unfold(3, window.size[1], 1)
            self.plan.padded[key] = known = (tensor, every)
        return known[1]

    def corner(self, window: Window) -> tuple[Tensor, Tensor]:
        """Row and column at which each window begins, (P,) each."""
        rows, columns = self._places
        return rows * window.stride[0] + window.start[0], columns * window.stride[1] + window.start[1]

    def cost(self, value: int, cost: Cost) -> Cost:
        """Of a step whose result is this value."""
        if value not in self.plan.windows:
            return cost.take(self.owner)
        return Cost(self.cut(value, cost.share).flatten(1), cost.floor[self.owner])

    def relaxation(self, number: int, relaxation: Relaxation) -> Relaxation:
        """That of a node, without its cost."""
        if number + 1 not in self.plan.windows:
            return relaxation.take(self.owner)
        return cropped(relaxation, self, number)

    def region(self, region: Region) -> Region:
        if 0 not in self.plan.windows:
            return region.take(self.owner)
        box = region.box
        if isinstance(region, Box):
            return Box(Interval(self.cut(0, box.centre), self.cut(0, box.radius), box.rounding))
        assert isinstance(region, Ball)
        around = Interval.between(self.cut(0, box.lower), self.cut(0, box.upper), box.rounding)
        return Ball(self.cut(0, region.x), region.threat, region.eps[self.owner], around)

    @property
    def _shape(self) -> Shape:
        return self.graph.shape(self.plan.source)

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        columns = self._shape[2]
        return torch.div(self.position, columns, rounding_mode="floor"), self.position % columns

    def _mask(self, number: int) -> Tensor | None:
        """1 where a window (P, 1, 1, h, w) that an operator reads is on the map, None where all of them are."""
        window, shape = self.plan.parts[number, 0], self.graph.shape(self.graph.nodes[number].inputs[0])
        key = window, shape[1:]
        if key not in self._masks:
            inside = []
            for i, corner in enumerate(self.corner(window)):
                at = corner[:, None] + torch.arange(window.size[i], device=self.owner.device)
                inside.append((at >= 0) & (at < shape[1 + i]))
            mask = (inside[0][:, :, None] & inside[1][:, None, :])[:, None, None]
            self._masks[key] = None if bool(mask.all()) else mask
        return self._masks[key]

    def _whole(self, part: Tensor, window: Window, shape: Shape) -> Tensor:
        """Patches put on maps (C, H, W) of zeros."""
        index = []
        for i, corner in enumerate(self.corner(window)):
            at = corner[:, None] + torch.arange(window.size[i], device=part.device)
            index.append(at.clamp(0, shape[1 + i] - 1))  # what is outside adds 0
        flat = (index[0][:, :, None] * shape[2] + index[1][:, None, :]).flatten(1)[:, None]
        patch = part.flatten(3).flatten(1, 2)
        maps = part.new_zeros(*patch.shape[:2], shape[1] * shape[2])
        maps = maps.scatter_add(2, flat.expand_as(patch), patch)
        return maps.view(*part.shape[:2], *shape)


@singledispatch
def cropped(relaxation: Any, patches: Patches, number: int) -> Relaxation:
    """A relaxation cut to windows; its costs are cut apart. A kind without a rule here is never asked."""
    raise TypeError(f"{type(relaxation).__name__} has no rule for patches")


@cropped.register
def _(relaxation: Lines, patches: Patches, number: int) -> Relaxation:
    def cut(tensor: Tensor) -> Tensor:
        return patches.cut(number + 1, tensor)

    return replace(
        relaxation,
        lower_slope=cut(relaxation.lower_slope),
        upper_slope=cut(relaxation.upper_slope),
        lower_offset=None if relaxation.lower_offset is None else cut(relaxation.lower_offset),
        upper_offset=cut(relaxation.upper_offset),
        cost=None,
    )


@cropped.register
def _(relaxation: SortedPairs, patches: Patches, number: int) -> Relaxation:
    lines = cropped(relaxation.lines, patches, number)
    assert isinstance(lines, Lines)
    return SortedPairs(lines)


@cropped.register
def _(relaxation: Winners, patches: Patches, number: int) -> Relaxation:
    window, columns = patches.plan.parts[number, 0], relaxation.shape[2]
    index, alone, largest = (
        patches.cut(number + 1, t).flatten(2) for t in (relaxation.index, relaxation.alone, relaxation.largest)
    )
    top, left = (t[:, None, None] for t in patches.corner(window))
    row, column = torch.div(index, columns, rounding_mode="floor") - top, index % columns - left
    inner = row.clamp(0, window.size[0] - 1) * window.size[1] + column.clamp(0, window.size[1] - 1)
    return Winners(inner, alone, largest, torch.Size((relaxation.shape[0], *window.size)))
