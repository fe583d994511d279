"""Operator norms of the affine operators of a graph: certified, and the estimates that training uses."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from holdfast.bounds.operators import Affine, Convolution, Graph, Linear, transposed
from holdfast.bounds.rounding import STEPS, Rounding
from holdfast.bounds.tail import tail_of
from holdfast.layers.operator_norm import (
    convolution_norm,
    dense_norm,
    is_small,
    matrix_norm,
    norm_from,
    power_iteration,
    start_of_iteration,
)

Gains = dict[int, Tensor]
"""Operator norm of each affine node, by its number."""


def certified_gains(graph: Graph, like: Tensor) -> Gains:
    """Upper bounds of the operator norms before the affine end, in float64."""
    return {number: node_gain(graph, number, like) for number in _before_the_end(graph, like)}


def estimated_gains(
    graph: Graph, like: Tensor, iterations: int = 10, *, saved: dict[str, Tensor] | None = None, further: int = 1
) -> Gains:
    """Power iteration: from below, differentiable in the weights; for training losses only.

    Args:
        iterations: from the fixed start.
        saved: the last left singular vectors, by place; where there is one the iteration goes on from it, and the
            new one replaces it.
        further: iterations from a saved vector.
    """
    numbers = _before_the_end(graph, like)
    return {number: _estimated(graph, number, like, iterations, saved, further) for number in numbers}


def _before_the_end(graph: Graph, like: Tensor) -> list[int]:
    """The affine nodes but those that are merged with the specification."""
    return affine_nodes(graph, range(tail_of(graph, like).stop))


def affine_nodes(graph: Graph, numbers: Iterable[int]) -> list[int]:
    """Those of these nodes."""
    return [n for n in numbers if isinstance(graph.nodes[n].operator, Affine)]


@torch.no_grad()
def node_gain(graph: Graph, number: int, like: Tensor) -> Tensor:
    """At least the operator norm of an affine node, in float64."""
    operator, shape = graph.nodes[number].operator, graph.shape(graph.nodes[number].inputs[0])
    assert isinstance(operator, Affine)
    if operator.norm:
        return like.new_tensor(operator.norm(), dtype=torch.float64)
    if isinstance(operator, Linear):
        return matrix_norm(operator.weight)
    if isinstance(operator, Convolution):
        exact = Convolution(
            operator.weight.double(), None, operator.stride, operator.padding, operator.dilation, operator.groups
        )
        zero = exact.weight.new_zeros(1, *shape)
        if is_small(exact.forward, zero):
            return dense_norm(exact.forward, zero)
        return convolution_norm(operator.weight, operator.stride, operator.dilation, operator.groups)
    if operator.absolute is operator.forward:  # it has no weights, and takes any type
        like = like.double()
    zero, rounding = like.new_zeros(1, *shape), Rounding.of(like.dtype)
    outputs = graph.nodes[number].shape
    share = rounding.gamma(operator.fan_out(outputs) + STEPS)
    if not operator.entrywise and is_small(operator.forward, zero):
        # Through the adjoint, in which the bias has no part; in the model's own precision.
        one = torch.eye(math.prod(outputs), dtype=like.dtype, device=like.device).view(-1, *outputs)
        rows, sizes = (
            torch.cat([transposed(function, part, shape).flatten(1) for part in one.split(512)]).double()
            for function in (operator.forward, operator.absolute)
        )
        return matrix_norm(rows) + share * (1 + 1e-6) * sizes.norm()
    # The largest sums of rows and columns of |W|, in which nothing cancels.
    share = rounding.gamma(operator.fan_in(shape) + operator.fan_out(outputs) + STEPS)
    return operator.gain(zero, shape, 2.0).double() * (1 + share)


def _estimated(
    graph: Graph, number: int, like: Tensor, iterations: int, saved: dict[str, Tensor] | None, further: int
) -> Tensor:
    node = graph.nodes[number]
    operator, shape = node.operator, graph.shape(node.inputs[0])
    assert isinstance(operator, Affine)
    if operator.entrywise:
        return operator.gain(like.new_zeros(1, *shape), shape, 2.0)
    if saved is None or not isinstance(operator, Convolution | Linear):
        return power_iteration(operator.forward, like.new_zeros(1, *shape), iterations=iterations)
    linear = replace(operator, constant=None)
    left = saved.get(place := f"{number} {node.path}")
    if left is None or left.shape[1:] != node.shape:
        left, further = linear.forward(start_of_iteration(like.new_zeros(1, *shape))).detach(), iterations
    norm, saved[place] = norm_from(left, linear.forward, lambda a: linear.adjoint(a, shape), iterations=further)
    return norm
