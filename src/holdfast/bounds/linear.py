"""The linear domain (CROWN): functions of a value become functions of the input, layer by layer, backward
(Zhang et al., 2018).

A backward pass starts with coefficients of some value of the graph and ends with a linear function of the input
that is nowhere above them; its minimum over the region is the bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor

from holdfast.bounds.interval import Interval, rule
from holdfast.bounds.operators import Affine, Concatenate, Graph, Linear, Operator, Rectifier, Sum, walk
from holdfast.bounds.region import Ball, Box, Region
from holdfast.bounds.relaxation import Relaxation, Slopes, relax
from holdfast.search import per_example

Relaxations = dict[int, Relaxation]
"""By the number of the node."""

BUDGET = 2**25
"""Coefficients held at a time while bounds of neurons are computed."""


@dataclass(frozen=True)
class LinearBound:
    """⟨a, input⟩ + the two offsets, nowhere above the functions that the pass began with."""

    coefficients: Tensor
    """(N, S, *input)."""
    of_activations: Tensor
    """What the relaxed operators add, (N, S)."""
    of_biases: Tensor
    """What the biases add, (N, S)."""

    def minimum(self, region: Region) -> Tensor:
        """The bound, (N, S)."""
        return region.minimum(self.coefficients) + self.of_activations + self.of_biases


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


def backward(graph: Graph, relaxations: Relaxations, value: int, a: Tensor) -> LinearBound:
    """The functions a (N, S, ...) of a value as linear functions of the input.

    Args:
        relaxations: of every node before the value that is not affine, for the same N examples.
    """
    pending = {value: a}
    of_activations = of_biases = a.new_zeros(a.shape[:2])
    for number in range(value - 1, -1, -1):
        if (a := pending.pop(number + 1, a.new_zeros(0))).numel() == 0:
            continue
        node = graph.nodes[number]
        if number in relaxations:
            pulled, offset = relaxations[number].pull(a)
            parts, of_activations = [pulled], of_activations + offset
        else:
            shapes = [graph.shape(source) for source in node.inputs]
            parts = split(node.operator, a, shapes)
            if isinstance(node.operator, Affine):
                of_biases = of_biases + a.flatten(2) @ _bias(node.operator, a, shapes[0])
        for source, part in zip(node.inputs, parts, strict=True):
            pending[source] = pending[source] + part if source in pending else part
    first = pending.get(0)
    if first is None:
        first = a.new_zeros(*of_biases.shape, *graph.input_shape)
    return LinearBound(first, of_activations, of_biases)


def _bias(operator: Affine, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    if isinstance(operator, Linear) and len(shape) == 1:
        return like.new_zeros(operator.weight.shape[0]) if operator.constant is None else operator.constant
    return operator.bias(like, shape).flatten()


def is_exact(operator: Operator) -> bool:
    """Whether a backward pass goes through it without a relaxation."""
    return isinstance(operator, Affine | Sum | Concatenate)


@dataclass(frozen=True)
class Sweep:
    """What a forward sweep knows of every value of a graph."""

    values: dict[int, Interval]
    """By the number of the value."""
    relaxations: Relaxations

    def bound(self, graph: Graph, region: Region, value: int, a: Tensor) -> Tensor:
        """Lower bounds (N, S) of the functions a (N, S, ...) of a value."""
        return backward(graph, self.relaxations, value, a).minimum(region)


def sweep(
    graph: Graph,
    region: Region,
    slopes: Callable[[int], Slopes],
    *,
    tighten: bool = False,
    intersect: bool = True,
    stop: int | None = None,
) -> Sweep:
    """The interval of every value, and the relaxations that hold there.

    Args:
        slopes: by the number of the node.
        tighten: bound the inputs of relaxed operators by backward passes (CROWN), not by intervals alone
            (CROWN-IBP).
        intersect: keep what the intervals know beside what the backward passes find, and ask these only of
            neurons that are not stable.
        stop: number of the last value wanted.
    """
    images = BallImages(graph, region)
    done = Sweep({0: region.box}, {})

    def step(number: int, operator: Operator, *inputs: Interval) -> Interval:
        if not is_exact(operator):
            source = graph.nodes[number].inputs[0]
            if tighten and not is_exact_interval(graph, region, source):
                done.values[source] = tightened(graph, region, done, source, operator, intersect)
            inputs = (done.values[source],)
            done.relaxations[number] = relax(operator, inputs[0], slopes(number))
        return images.tighten(number, rule(operator, *inputs))

    walk(graph, done.values, step, range(len(graph.nodes))[:stop])
    return done


def intervals(graph: Graph, region: Region, stop: int | None = None) -> dict[int, Interval]:
    """The interval of every value: IBP, and affine images of the ball itself where the region is one."""
    images = BallImages(graph, region)

    def step(number: int, operator: Operator, *inputs: Interval) -> Interval:
        return images.tighten(number, rule(operator, *inputs))

    return walk(graph, {0: region.box}, step, range(len(graph.nodes))[:stop])


class BallImages:
    """Affine images of the ball around each input: W x + b ± eps · lengths of the rows of W."""

    def __init__(self, graph: Graph, region: Region) -> None:
        self.graph = graph
        self.order = region.threat.order if isinstance(region, Ball) else 0.0
        self.known = {0: (region.x, region.eps)} if isinstance(region, Ball) and self.order in (1.0, 2.0) else {}

    def tighten(self, number: int, value: Interval) -> Interval:
        """The interval of a node's result, cut with what is known of the ball there."""
        node = self.graph.nodes[number]
        if node.inputs[0] not in self.known or not isinstance(node.operator, Affine):
            return value
        centre, eps = self.known[node.inputs[0]]
        shape, operator = self.graph.shape(node.inputs[0]), node.operator
        rows = operator.row_lengths(centre, shape, 2.0 if self.order == 2 else torch.inf)
        reach = per_example(eps, value.centre) * rows
        centre = operator.forward(centre)
        self.known[number + 1] = centre, eps * operator.gain(centre, shape, self.order)
        return value.intersect(centre - reach, centre + reach)


def tightened(
    graph: Graph, region: Region, done: Sweep, source: int, operator: Operator, intersect: bool
) -> Interval:
    """The interval of a value by backward passes from its neurons, a chunk of them at a time."""
    value = done.values[source]
    asked = unsettled(operator, value) if intersect else torch.ones_like(value.centre, dtype=torch.bool)
    lower, upper = value.lower.flatten(1), value.upper.flatten(1)
    size = max(1, BUDGET // (2 * max(math.prod(graph.shape(i)) for i in range(source + 1))))
    for pairs in asked.flatten(1).nonzero().split(size):
        owner, neuron = pairs.unbind(1)
        low, high = neuron_bounds(graph, region, done.relaxations, source, owner, neuron)
        if intersect:
            low, high = torch.maximum(low, lower[owner, neuron]), torch.minimum(high, upper[owner, neuron])
            low, high = torch.minimum(low, high), torch.maximum(low, high)  # should rounding cross them
        lower = lower.index_put((owner, neuron), low)
        upper = upper.index_put((owner, neuron), high)
    return Interval.between(lower.view_as(value.centre), upper.view_as(value.centre))


def neuron_bounds(
    graph: Graph, region: Region, relaxations: Relaxations, source: int, owner: Tensor, neuron: Tensor
) -> tuple[Tensor, Tensor]:
    """Lower and upper bound of M neurons of a value, (M,) each: neuron ``neuron`` of example ``owner``."""
    a = both_ways(owner, neuron, graph.shape(source), region.box.centre)
    before = {number: relaxation.take(owner) for number, relaxation in relaxations.items() if number < source}
    bounds = backward(graph, before, source, a).minimum(region.take(owner))
    return bounds[:, 0], -bounds[:, 1]


def both_ways(owner: Tensor, neuron: Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The functions v and −v of a neuron each, (M, 2, *shape)."""
    one = like.new_zeros(len(owner), math.prod(shape))
    one[torch.arange(len(owner), device=owner.device), neuron] = 1
    return torch.stack([one, -one], 1).view(len(owner), 2, *shape)


def unsettled(operator: Operator, value: Interval) -> Tensor:
    """Where a tighter interval could make a better relaxation."""
    if isinstance(operator, Rectifier):
        return (value.lower < 0) & (value.upper > 0)
    return value.radius > 0


def is_exact_interval(graph: Graph, region: Region, value: int) -> bool:
    """Whether intervals lose nothing there: affine maps of a box, at most one of which mixes entries."""
    mixing = 0 if isinstance(region, Box) else math.inf
    while value:
        node = graph.nodes[value - 1]
        if not isinstance(node.operator, Affine):
            return False
        mixing += not node.operator.entrywise
        value = node.inputs[0]
    return mixing <= 1
