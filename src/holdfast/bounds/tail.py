"""The affine end of a graph, in one step: what is asked of the logits becomes a question about earlier values.

Behind the last operator that is not affine everything is one affine map, however it is written: a dense layer, two
of them, a scale, a bias, BatchNorm, a reshape, a sum of heads. Bounds that are taken before it lose nothing to it
(last-layer elision).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.bounds.linear import is_exact
from holdfast.bounds.operators import (
    Affine,
    Graph,
    Linear,
    Map,
    Operator,
    Shape,
    Sum,
    apply,
    computed,
    outside_inference_mode,
    walk,
)
from holdfast.bounds.patches import split
from holdfast.bounds.rounding import STEPS, Rounding


@dataclass(frozen=True)
class Tail:
    """logits = Σ_v W_v · value v + b over the values v it begins at."""

    graph: Graph
    sources: tuple[int, ...]
    """The numbers of these values, ascending."""
    inner: tuple[int, ...]
    """The numbers of the nodes behind them, ascending."""

    @property
    def stop(self) -> int:
        """The last value that has to be known."""
        return self.sources[-1]

    def logits(self, values: Mapping[int, Tensor]) -> Tensor:
        """The logits (N, K) at points of the sources, (N, ...) each."""
        return computed(self.graph, dict(values), self.inner)[len(self.graph.nodes)]

    def matrices(self, like: Tensor) -> dict[int, Tensor]:
        """W_v of each source, (K, its entries); differentiable in the weights."""
        last, inner = len(self.graph.nodes), self.inner
        if inner and isinstance(end := self.graph.nodes[last - 1].operator, Linear):
            pending, inner = {self.graph.nodes[last - 1].inputs[0]: end.weight[None]}, inner[:-1]
        else:
            with outside_inference_mode():
                one = torch.eye(math.prod(self.graph.shape(last)), dtype=like.dtype, device=like.device)
            pending = {last: one.view(1, len(one), *self.graph.shape(last))}
        for number in reversed(inner):
            node = self.graph.nodes[number]
            shapes = [self.graph.shape(source) for source in node.inputs]
            with outside_inference_mode():
                parts = split(node.operator, pending.pop(number + 1), shapes)
            for source, part in zip(node.inputs, parts, strict=True):
                pending[source] = pending[source] + part if source in pending else part
        return {source: pending[source].flatten(2)[0] for source in self.sources}

    def error(self, summed: Map, sizes: Mapping[int, Tensor], rounding: Rounding) -> Tensor:
        """What linear functions of ``logits`` and of ``matrices`` may err by together on values of these sizes,
        (N, ...) each; (N, M).

        Every product on the way errs by a share of |rows| Σ_v |W_v| |value v| + |b|.

        Args:
            summed: sizes (N, K) of the logits ↦ |rows| times these, (N, M), for the rows of the functions.
        """
        classes = math.prod(self.graph.shape(len(self.graph.nodes)))
        roundings = STEPS + classes + 2 * len(self.inner)  # a sum of values, and of their coefficients
        like = next(iter(sizes.values()))

        def step(number: int, operator: Operator, *values: Tensor) -> Tensor:
            if isinstance(operator, Sum):
                return values[0] + values[1]
            if not isinstance(operator, Affine):
                return apply(operator, *values)
            source = self.graph.shape(self.graph.nodes[number].inputs[0])
            return operator.absolute(values[0]) + operator.bias_size(like, source)

        for number in self.inner:
            node = self.graph.nodes[number]
            if isinstance(node.operator, Affine):
                shape = self.graph.shape(node.inputs[0])
                roundings += max(node.operator.fan_in(shape), node.operator.fan_out(node.shape)) + STEPS
        roundings += max(math.prod(self.graph.shape(source)) for source in self.sources)
        logits = walk(self.graph, dict(sizes), step, self.inner)[len(self.graph.nodes)]
        # The matrices, their products with what is around the centre, and the centre's own logits: each errs once.
        total = torch.stack([size.flatten(1).sum(1) for size in sizes.values()]).sum(0)
        floor = rounding.tiny * roundings * (1 + total)
        return 3 * rounding.gamma(roundings) * summed(logits.flatten(1)) + floor[:, None]


def tail_of(graph: Graph, like: Tensor) -> Tail:
    """Everything behind the last operators that are not affine.

    What only gathers entries in front of the rest (a flatten, an average over windows apart) stays outside: bounds
    of its result are as good, and there are fewer of them.
    """
    if "tail" not in graph.structure:
        graph.structure["tail"] = _ends(graph, like)
    return Tail(graph, *graph.structure["tail"])


def _ends(graph: Graph, like: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sources and the inner nodes of ``tail_of``."""
    wanted, sources, inner = {len(graph.nodes)}, set(), []
    for number in range(len(graph.nodes) - 1, -1, -1):
        if number + 1 not in wanted:
            continue
        node = graph.nodes[number]
        if is_exact(node.operator):
            inner.append(number)
            wanted.update(node.inputs)
        else:
            sources.add(number + 1)
    sources |= wanted & {0}
    read = [source for number in inner for source in graph.nodes[number].inputs]
    for number in reversed(list(inner)):
        node, source = graph.nodes[number], graph.nodes[number].inputs[0]
        alone = source in sources - {0} and read.count(source) == 1  # of the input the region knows more than a box
        if alone and gathers(node.operator, graph.shape(source), node.shape, like):
            inner.remove(number)
            sources = sources - {source} | {number + 1}
    return tuple(sorted(sources)), tuple(reversed(inner))


def gathers(operator: Operator, before: Shape, after: Shape, like: Tensor) -> bool:
    """Whether an operator is linear with weights ≥ 0 and reads no entry twice: |a W| r = |a| W r then for all a."""
    if not isinstance(operator, Affine) or operator.absolute is not operator.forward:
        return False
    if operator.entrywise and math.prod(before) == math.prod(after):
        return True
    # Entries that are read twice with different signs cancel.
    generator = torch.Generator().manual_seed(0)
    with outside_inference_mode(), torch.no_grad():
        signs = 2 * torch.randint(0, 2, (1, *after), generator=generator).to(like.device, like.dtype) - 1
        cancelling, summed = (operator.adjoint(a, before) for a in (signs, torch.ones_like(signs)))
        return torch.equal(cancelling.abs(), summed)
