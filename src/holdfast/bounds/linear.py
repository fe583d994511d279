"""The linear domain (CROWN): functions of a value become functions of the input, layer by layer, backward
(Zhang et al., 2018).

A backward pass starts with coefficients of some value of the graph and ends with a linear function of the input
that is nowhere above them; its minimum over the region is the bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import cast

import torch
from torch import Tensor

from holdfast.bounds.fields import Channels, Plan
from holdfast.bounds.interval import Interval, image
from holdfast.bounds.neurons import contested, tightened
from holdfast.bounds.operators import (
    Affine,
    Concatenate,
    Elementwise,
    Graph,
    MaxPool,
    Operator,
    Rectifier,
    Shape,
    Sum,
    UnsupportedOperator,
    lengths,
    walk,
)
from holdfast.bounds.patches import Maps, Patches
from holdfast.bounds.region import Ball, Box, Region
from holdfast.bounds.relaxation import Relaxation, Slopes, relax
from holdfast.bounds.rounding import STEPS, Bound, Cost, Rounding, dots
from holdfast.search import per_example

Relaxations = dict[int, Relaxation]
"""By the number of the node."""


@dataclass(frozen=True)
class Costs:
    """What rounding may take from a backward pass through values that lie in these intervals."""

    graph: Graph
    rounding: Rounding
    values: dict[int, Interval]
    """By the number of the value."""
    affine: dict[int, Cost]
    """By the number of the node."""
    rows: Tensor | None = None
    """The examples that the pass is of; all by default."""
    patches: Patches | None = None
    """What the pass is cut to."""
    steps: dict[int, tuple[Cost, Cost]] = field(default_factory=dict)
    """Of relaxed operators, with the steps before them, beside their own costs; by the number of the node."""

    def take(self, rows: Tensor) -> Costs:
        """Those of some examples."""
        return replace(self, rows=rows)

    def cut(self, patches: Patches) -> Costs:
        """Those of a pass that moves patches."""
        return replace(self, patches=patches)

    def of(self, number: int, relaxation: Relaxation | None, a: Tensor, last: bool) -> Tensor | float:
        """Of a step through a node, with coefficients a (N, S, ...) of its result; (N, S).

        Args:
            last: whether it is the node that the pass begins with.
        """
        if relaxation is None:
            if self.rounding.network and isinstance(self.graph.nodes[number].operator, Sum):
                return self.of_value(number + 1, a)
            mine = number in self.affine and (last or number not in self._under_lines)
            return self._cut(number + 1, self._affine(number)).of(a.detach()) if mine else 0.0
        if (cost := relaxation.cost) is None:
            kind = type(relaxation).__name__
            raise UnsupportedOperator(f"the relaxation {kind} does not say what rounding costs it; ibp may do")
        if self.patches is None:
            return self._with_step_before(number, cost).of(a.detach())
        if (known := self.steps.get(number)) is None or known[0] is not cost:
            self.steps[number] = known = (cost, self._with_step_before(number, cost))
        return self._cut(number + 1, known[1]).of(a.detach())

    def _with_step_before(self, number: int, cost: Cost) -> Cost:
        """Behind lines that are no steeper the coefficients are no larger: two steps by one product."""
        node = self.graph.nodes[number]
        if (before := node.inputs[0] - 1) in self._under_lines and before in self.affine:
            return cost.plus(self._affine(before), 1.001 * cast(Elementwise, node.operator).steepest)
        return cost

    def of_value(self, value: int, a: Tensor) -> Tensor:
        """Of an addition that gave coefficients a (N, S, ...) of a value; (N, S)."""
        size = self.values[value].size
        if self.patches is not None:
            size = self.patches.cut(value, size)
        return self.rounding.gamma(2) * dots(a.detach().abs(), size if self.rows is None else size[self.rows])

    def with_multipliers(self, value: int, cost: Cost, beta: Tensor) -> Cost:
        """Of a pull through lines on a value, slopes in [−1, 1], to the result of which β (N, ...) is added.

        Whatever the coefficients a of the lines' result are, the addition errs by a share of |a| + |β|, and the
        affine step before, which was counted by |a|, makes something of β, too.
        """
        beta, size = beta.detach().abs(), self.values[value].size
        size = (size if self.rows is None else size[self.rows]).flatten(1)
        gamma = self.rounding.gamma(4)
        floor = cost.floor + gamma * (beta.flatten(1) * size).sum(1)
        if (before := value - 1) in self._under_lines and before in self.affine:
            floor = floor + 1.001 * self._affine(before).of(beta[:, None])[:, 0]
        return Cost(cost.share + gamma * size, floor)

    def _affine(self, number: int) -> Cost:
        return self.affine[number] if self.rows is None else self.affine[number].take(self.rows)

    def _cut(self, value: int, cost: Cost) -> Cost:
        return cost if self.patches is None else self.patches.cost(value, cost)

    @cached_property
    def _under_lines(self) -> set[int]:
        """The affine nodes whose result a function of single entries reads, and nothing else."""
        readers: dict[int, list[Operator]] = {}
        for node in self.graph.nodes:
            for source in node.inputs:
                readers.setdefault(source, []).append(node.operator)
        nodes = range(len(self.graph.nodes))
        return {
            n for n in nodes if isinstance(readers.get(n + 1, [None])[0], Elementwise) and len(readers[n + 1]) == 1
        }


def affine_cost(operator: Affine, value: Interval, rounding: Rounding, shape: Shape) -> Cost:
    """Of a step through an affine operator, the result of which has this shape.

    Wᵀ a errs by a share of |W|ᵀ |a|, which costs as much of ⟨|a|, |W| |v|⟩; ⟨a, b⟩ by one of ⟨|a|, |b|⟩.
    """
    entries, source = math.prod(shape), tuple(value.centre.shape[1:])
    out = operator.fan_out(shape)
    if rounding.network:  # torch sums W v, too
        out = max(out, operator.fan_in(source))
    share = rounding.gamma(out + STEPS) * operator.absolute(value.size)
    share = share + rounding.gamma(entries + STEPS) * operator.bias_size(value.centre, source)
    share = share + rounding.tiny  # which may have underflowed
    return Cost(share.flatten(1), rounding.tiny * (out + 1) * (entries + value.size.flatten(1).sum(1)))


@dataclass(frozen=True)
class LinearBound:
    """⟨a, input⟩ + the two offsets, nowhere above the functions that the pass began with."""

    coefficients: Tensor
    """(N, S, *input)."""
    of_activations: Tensor
    """What the relaxed operators add, (N, S)."""
    of_biases: Tensor
    """What the biases add, (N, S)."""
    slack: Tensor | None = None
    """Up to rounding that may add so much, (N, S); None where it was not accounted for."""
    entries: int = 0
    """Of an input, where the coefficients are of a part of it."""

    def minimum(self, region: Region) -> Bound:
        """The bound, (N, S)."""
        first = region.minimum(self.coefficients)
        lower = first.lower + self.of_activations + self.of_biases
        if self.slack is None or (rounding := region.rounding) is None or first.slack is None:
            return Bound(lower)
        size = first.lower.abs() + self.of_activations.abs() + self.of_biases.abs()
        slack = (self.slack + first.slack + rounding.gamma(STEPS) * size).detach()
        # The slack is itself a sum of sizes, over the entries of all values.
        slack = rounding.up(slack, max(self.entries, math.prod(self.coefficients.shape[2:])) + 2**10)
        return Bound(lower - slack, slack)


def backward(
    graph: Graph,
    relaxations: Relaxations,
    value: int,
    a: Tensor,
    costs: Costs | None = None,
    patches: Patches | None = None,
) -> LinearBound:
    """The functions a (N, S, ...) of a value as linear functions of the input.

    Args:
        relaxations: of every node before the value that is not affine, for the same N examples.
        costs: what rounding takes, for the same examples.
        patches: what the pass moves in place of whole values; relaxations are then of the examples that they are
            cut from, and costs are cut.
    """
    maps = patches or Maps(graph)
    pending = {value: a}
    slack = None if costs is None else a.new_zeros(a.shape[:2])
    of_activations = of_biases = a.new_zeros(a.shape[:2])
    for number in range(value - 1, -1, -1):
        if (a := pending.pop(number + 1, a.new_zeros(0))).numel() == 0:
            continue
        node, relaxation = graph.nodes[number], relaxations.get(number)
        if relaxation is not None:
            here = relaxation if patches is None else patches.relaxation(number, relaxation)
            pulled, offset = here.pull(a)
            parts, of_activations = [pulled], of_activations + offset
        else:
            parts = maps.parts(number, a)
            if isinstance(node.operator, Affine):
                of_biases = of_biases + maps.biases(number, a)
        if costs is not None and slack is not None:
            sums = (of_activations.abs() + of_biases.abs()).detach()
            slack = slack + costs.of(number, relaxation, a, number == value - 1) + costs.rounding.gamma(2) * sums
        for place, source in enumerate(node.inputs):
            part = maps.fitted(number, place, parts[place])
            if source in pending:
                part = pending[source] + part
                if costs is not None and slack is not None:
                    slack = slack + costs.of_value(source, part)
            pending[source] = part
    first = pending.get(0)
    if first is None:
        first = a.new_zeros(*of_biases.shape, *graph.input_shape)
    return LinearBound(first, of_activations, of_biases, slack, math.prod(graph.input_shape))


def is_exact(operator: Operator) -> bool:
    """Whether a backward pass goes through it without a relaxation."""
    return isinstance(operator, Affine | Sum | Concatenate)


@dataclass(frozen=True)
class Sweep:
    """What a forward sweep knows of every value of a graph."""

    values: dict[int, Interval]
    """By the number of the value."""
    relaxations: Relaxations
    costs: Costs | None = None

    def bound(self, graph: Graph, region: Region, value: int, a: Tensor) -> Bound:
        """Lower bounds (N, S) of the functions a (N, S, ...) of a value."""
        return backward(graph, self.relaxations, value, a, self.costs).minimum(region)

    def take(self, rows: Tensor) -> Sweep:
        """What it knows of some examples, for passes from what comes last."""
        relaxations = {number: relaxation.take(rows) for number, relaxation in self.relaxations.items()}
        return Sweep({}, relaxations, self.costs and self.costs.take(rows))

    def patch_bound(self, region: Region, patches: Patches) -> Bound:
        """Those (P, 2 S) of the neurons at P positions and of their negatives."""
        costs, a = self.costs and self.costs.cut(patches), patches.start(region.box.centre)
        found = backward(patches.graph, self.relaxations, patches.plan.source, a, costs, patches)
        return found.minimum(patches.region(region))


def sweep(
    graph: Graph,
    region: Region,
    slopes: Callable[[int], Slopes],
    *,
    tighten: bool = False,
    intersect: bool = True,
    stop: int | None = None,
    going: Callable[[], bool] = lambda: True,
) -> Sweep:
    """The interval of every value, and the relaxations that hold there.

    Args:
        slopes: by the number of the node.
        tighten: bound the inputs of relaxed operators by backward passes (CROWN), not by intervals alone
            (CROWN-IBP).
        intersect: keep what the intervals know beside what the backward passes find, and ask these only of
            neurons that are not stable.
        stop: number of the last value wanted.
        going: asked before each chunk of neurons whether there is time for it; the others keep their intervals.
    """
    images, rounding = BallImages(graph, region), region.rounding
    values = {0: region.box}
    done = Sweep(values, {}, None if rounding is None else Costs(graph, rounding, values, {}))
    channels: Channels = {}

    def step(number: int, operator: Operator, *inputs: Interval) -> Interval:
        if not is_exact(operator):
            source = graph.nodes[number].inputs[0]
            if tighten and not is_exact_interval(graph, region, source):
                value = done.values[source]
                asked = unsettled(operator, value) if intersect else torch.ones_like(value.centre).bool()
                plan = Plan.of(graph, source, done.relaxations, channels, value.centre)
                done.values[source] = tightened(
                    plan, region, value, asked, partial(done.patch_bound, region), intersect, going
                )
            inputs = (done.values[source],)
            done.relaxations[number] = relax(operator, inputs[0], slopes(number))
        if done.costs and isinstance(operator, Affine) and not operator.moves:
            node, rounding = graph.nodes[number], done.costs.rounding
            done.costs.affine[number] = affine_cost(operator, inputs[0], rounding, node.shape)
        return images.tighten(number, image(operator, *inputs))

    walk(graph, done.values, step, range(len(graph.nodes))[:stop])
    return done


def relaxed_at(graph: Graph, values: dict[int, Interval], slopes: Callable[[int], Slopes]) -> Sweep:
    """The relaxations on intervals from elsewhere, in plain arithmetic."""
    relaxations = {
        number: relax(node.operator, values[node.inputs[0]], slopes(number))
        for number, node in enumerate(graph.nodes)
        if not is_exact(node.operator)
    }
    return Sweep(values, relaxations)


def intervals(graph: Graph, region: Region, stop: int | None = None) -> dict[int, Interval]:
    """The interval of every value: IBP, and affine images of the ball itself where the region is one."""
    images = BallImages(graph, region)

    def step(number: int, operator: Operator, *inputs: Interval) -> Interval:
        return images.tighten(number, image(operator, *inputs))

    return walk(graph, {0: region.box}, step, range(len(graph.nodes))[:stop])


class BallImages:
    """Affine images of the ball around each input: W x + b ± eps · lengths of the rows of W."""

    def __init__(self, graph: Graph, region: Region) -> None:
        self.graph, self.rounding = graph, region.rounding
        self.order = region.threat.order if isinstance(region, Ball) else 0.0
        self.known = {0: (region.x, region.eps)} if isinstance(region, Ball) and self.order in (1.0, 2.0) else {}
        """Centre and radius of the ball that holds a value."""

    def tighten(self, number: int, value: Interval) -> Interval:
        """The interval of a node's result, cut with what is known of the ball there."""
        node = self.graph.nodes[number]
        if node.inputs[0] not in self.known or not isinstance(node.operator, Affine):
            return value
        known, eps = self.known[node.inputs[0]]
        shape, operator, rounding = self.graph.shape(node.inputs[0]), node.operator, self.rounding
        rows = operator.row_lengths(known, shape, 2.0 if self.order == 2 else torch.inf)
        reach = per_example(eps, value.centre) * rows
        eps = eps * operator.gain(known, shape, self.order)
        if rounding is None:
            centre = operator.forward(known)
        else:  # the ball is around the centre as it is computed, which errs by the radius of a point's interval
            point = image(operator, Interval.point(known, rounding))
            entries = math.prod(shape) + math.prod(node.shape)
            centre, reach = point.centre, rounding.up(reach, entries) + point.radius
            eps = rounding.up(eps + lengths(point.radius.flatten(1), self.order), 2 * entries)
        self.known[number + 1] = centre, eps
        around = Interval(centre, reach, rounding)
        return value.intersect(around.lower, around.upper)


def both_ways(owner: Tensor, neuron: Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The functions v and −v of a neuron each, (M, 2, *shape)."""
    one = like.new_zeros(len(owner), math.prod(shape))
    one[torch.arange(len(owner), device=owner.device), neuron] = 1
    return torch.stack([one, -one], 1).view(len(owner), 2, *shape)


def unsettled(operator: Operator, value: Interval) -> Tensor:
    """Where a tighter interval could make a better relaxation."""
    if isinstance(operator, Rectifier):
        return (value.lower < 0) & (value.upper > 0)
    return contested(operator, value) if isinstance(operator, MaxPool) else value.radius > 0


def is_exact_interval(graph: Graph, region: Region, value: int) -> bool:
    """Whether intervals lose nothing there: affine maps of a box, at most one of which mixes entries, and functions
    of single entries."""
    mixing = 0 if isinstance(region, Box) else math.inf
    while value:
        node = graph.nodes[value - 1]
        if isinstance(node.operator, Affine):
            mixing += not node.operator.entrywise
        elif not isinstance(node.operator, Elementwise):
            return False
        value = node.inputs[0]
    return mixing <= 1
