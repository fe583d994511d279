"""Calls that only move, choose or average entries."""

from __future__ import annotations

import operator as python

import torch
from torch import Tensor

from holdfast.bounds.calls import Argument, Call, Rows
from holdfast.bounds.operators import Concatenate, Operator, UnsupportedOperator, moved, positive


def _reshaping(call: Call) -> Operator:
    shape = call.result.shape[1:]
    return moved(lambda x: x.reshape(len(x), *shape))


def _rearranging(call: Call) -> Operator:
    """A permutation, selection or mean, which must leave the batch dimension alone."""
    x = call.activation
    numbers = torch.arange(len(x), dtype=x.dtype, device=x.device)
    moved = call(numbers.view(-1, *[1] * (x.dim() - 1)).expand(x.shape))
    if moved.shape[:1] != numbers.shape or (moved.reshape(len(x), -1) != numbers[:, None]).any():
        raise UnsupportedOperator("it mixes or moves the examples of the batch")
    return positive(call)


def _concatenation(call: Call) -> Operator:
    parts, *rest = call.args or (call.kwargs["tensors"],)
    dim = rest[0] if rest else call.kwargs.get("dim", call.kwargs.get("axis", 0))
    dim = dim % call.result.dim()
    if dim == 0 or not all(isinstance(part, Argument) for part in parts):
        raise UnsupportedOperator("only activations can be concatenated, and not along the batch")
    return Concatenate(dim)


def _selection(call: Call) -> Operator:
    index = call.args[1] if len(call.args) > 1 else 0
    if call.function is python.getitem:
        first = index[0] if isinstance(index, tuple) else index
        whole = first == slice(None) if isinstance(first, slice) else first is Ellipsis
    else:
        whole = index % call.activation.dim() != 0
    if not whole:
        raise UnsupportedOperator("it selects among the examples of the batch")
    return _rearranging(call)


_aten = torch.ops.aten
MOVES: Rows = [
    (_concatenation, [torch.cat, torch.concat, torch.concatenate, _aten.cat.default]),
    (
        _rearranging,
        [torch.permute, Tensor.permute, torch.transpose, Tensor.transpose, torch.mean, Tensor.mean],
    ),
    (_selection, [python.getitem, _aten.slice.Tensor, _aten.select.int]),
    (_rearranging, [_aten.permute.default, _aten.transpose.int, _aten.mean.dim]),
    (_reshaping, [torch.flatten, Tensor.flatten, torch.reshape, Tensor.reshape, Tensor.view]),
    (_reshaping, [torch.squeeze, Tensor.squeeze, torch.unsqueeze, Tensor.unsqueeze, Tensor.contiguous]),
    (_reshaping, [_aten.flatten.using_ints, _aten.reshape.default, _aten.view.default, _aten.squeeze.dims]),
    (_reshaping, [_aten.squeeze.dim, _aten.unsqueeze.default, _aten.contiguous.default]),
]
