"""Calls that only move, copy, choose or sum up entries."""

from __future__ import annotations

import math
import operator as python
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.bounds.calls import (
    SAME,
    Argument,
    Call,
    Chain,
    Lowered,
    Rows,
    Several,
    Steps,
    constant,
    shaped,
    spelled,
    spread_to,
)
from holdfast.bounds.operators import Affine, Concatenate, Map, Operator, UnsupportedOperator, moved


def _reshaping(call: Call) -> Lowered:
    _alone(call.activation, call.result)
    same = call.result.shape == call.activation.shape
    return _of_first(call, SAME if same else shaped(tuple(call.result.shape[1:])))


def _of_first(call: Call, operator: Operator) -> Lowered:
    """An operator of the first activation; of a second one the call reads the shape or the type alone."""
    if len(call.activations) == 1:
        return operator
    steps = Chain(call)
    steps.add(operator, 0)
    return steps.steps


def _alone(x: Tensor, result: Tensor) -> None:
    if result.shape[:1] != x.shape[:1]:
        raise UnsupportedOperator(
            f"it does not keep the batch dimension first: {tuple(x.shape)} becomes {tuple(result.shape)}"
        )


def _moving(call: Call) -> Operator:
    """A call that moves, copies or drops entries, or puts zeros between them."""
    return gathering(call, call.activation)


def gathering(function: Map, x: Tensor) -> Operator:
    """Such a function, tried on numbered entries: those of an example may be read for that example alone.

    Raises:
        UnsupportedOperator: it mixes or moves the examples of the batch.
    """
    size = x[0].numel()
    numbers = torch.arange(1, x.numel() + 1, dtype=torch.float64, device=x.device).view(x.shape)
    found = function(numbers)
    _alone(x, found)
    first = size * torch.arange(len(x), device=x.device).view(-1, *[1] * (found.dim() - 1))
    within = torch.where(found == 0, 0, found - first).long()
    if ((within < 0) | (within > size)).any() or not torch.equal(within, within[:1].expand_as(within)):
        raise UnsupportedOperator("it mixes or moves the examples of the batch")
    copies = int(torch.bincount(within[0].flatten(), minlength=size + 1)[1:].max()) if size else 0
    return Affine(function, function, entrywise=copies <= 1, summands=max(1, copies))


def _spreading(call: Call) -> Lowered:
    x, shape = call.activation, call.result.shape
    if len(shape) != x.dim():
        raise UnsupportedOperator(f"{tuple(x.shape)} spread to {tuple(shape)} moves the examples of the batch")
    _alone(x, call.result)
    return _of_first(call, SAME if shape == x.shape else spread_to(x, tuple(shape[1:])))


def _selection(call: Call) -> Operator:
    constant((call.args[1:], call.kwargs), "what it selects")
    index = call.args[1] if len(call.args) > 1 else 0
    if call.function in (python.getitem, *_INDEX):
        first = index[0] if isinstance(index, tuple | list) else index
        whole = first in (None, Ellipsis) if not isinstance(first, slice | Tensor) else first == slice(None)
    else:
        whole = call.kwargs.get("dim", index) % call.activation.dim() != 0 or _is_all(call)
    if not whole:
        raise UnsupportedOperator("it selects among the examples of the batch")
    return _moving(call)


def _is_all(call: Call) -> bool:
    """Whether a slice along the batch takes all of it, as torch.export writes some down."""
    start, end, *step = call.args[2:5] if len(call.args) > 3 else (None, None)
    return call.function in _SLICE and not start and (end is None or end >= 2**62) and step in ([], [1])


def _several(call: Call) -> Lowered:
    """Split, chunk, unbind: several results, each a selection."""
    constant((call.args[1:], call.kwargs), "where it splits")
    parts = [lambda x, place=place: call(x)[place] for place in range(len(call.result))]
    return Several(tuple(gathering(part, call.activation) for part in parts))


def _summing(call: Call, mean: bool) -> Lowered:
    def rule(input: Argument, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Operator:
        x = input.value
        dims = reduced_dims(x, dim, "sums over" if not mean else "averages over")
        if dtype not in (None, x.dtype):
            raise UnsupportedOperator(f"it changes the precision from {x.dtype} to {dtype}")
        if not dims:
            return SAME

        def function(x: Tensor) -> Tensor:
            return x.mean(dims, keepdim) if mean else x.sum(dims, keepdim)

        count = torch.Size(x.shape[dim] for dim in dims).numel()
        return Affine(function, function, entrywise=count == 1, summands=max(1, count))

    return call.read(rule)


def reduced_dims(x: Tensor, dim: Any, does: str) -> list[int]:
    """Dimensions of x, ascending.

    Raises:
        UnsupportedOperator: the batch is among them.
    """
    given = range(x.dim()) if dim is None or dim in ((), []) else (dim,) if isinstance(dim, int) else dim
    dims = sorted({each % x.dim() for each in given})
    if 0 in dims:
        raise UnsupportedOperator(f"it {does} the examples of the batch (dimension 0)")
    return dims


def _concatenation(call: Call) -> Lowered:
    def rule(tensors: Any, dim: int = 0) -> Lowered:
        return _joined(call, [(part, None) for part in tensors], dim)

    return call.read(rule)


def _stack(call: Call) -> Lowered:
    def rule(tensors: Any, dim: int = 0) -> Lowered:
        place = dim % call.result.dim()
        return _joined(call, [(part, place) for part in tensors], dim)

    return call.read(rule)


def _joined(call: Call, parts: list[tuple[Any, int | None]], dim: int) -> Steps:
    """Parts side by side; each with the place of a dimension that it is to get, if it is."""
    if (dim := dim % call.result.dim()) == 0:
        raise UnsupportedOperator("it puts the examples of the batch beside each other (dimension 0)")
    steps, numbers = Chain(call), []
    for part, place in parts:
        value = part.value if isinstance(part, Argument) else _for_every_example(part, call.activation)
        shape = tuple((value if place is None else value.unsqueeze(place)).shape[1:])
        if not isinstance(part, Argument):
            numbers.append(steps.add(_fixed(value.reshape(1, *shape)), 0))
        else:
            numbers.append(part.place if place is None else steps.add(shaped(shape), part.place))
    steps.add(Concatenate(dim), *numbers)
    return steps.steps


def _for_every_example(constant: Tensor, x: Tensor) -> Tensor:
    """A constant in a batch as it is for one example, (1, ...)."""
    if len(constant) != len(x) or not torch.equal(constant, constant[:1].expand_as(constant)):
        raise UnsupportedOperator("a constant beside the activations differs from example to example")
    return constant[:1]


def _fixed(value: Tensor) -> Operator:
    """A constant (1, ...) as a function of an activation, which it does not depend on."""

    def nothing(x: Tensor) -> Tensor:
        return (0 * x.flatten(1)[:, :1]).view(-1, *[1] * (value.dim() - 1)).expand(len(x), *value.shape[1:])

    return Affine(lambda x: nothing(x) + value, nothing, summands=value.numel())


def padded(pads: Sequence[int], mode: str, value: float) -> Operator:
    """Padding of the last dimensions, that of the last first: two numbers each, which may be negative."""
    pads, kind = list(pads), mode
    if kind == "constant":
        if not value:
            return moved(lambda x: F.pad(x, pads))
        return Affine(lambda x: F.pad(x, pads, kind, value), lambda radius: F.pad(radius, pads), entrywise=True)
    copies = math.prod(1 + sum(max(side, 0) for side in pair) for pair in zip(pads[::2], pads[1::2], strict=True))

    def around(x: Tensor) -> Tensor:
        return F.pad(x, pads, kind)

    return Affine(around, around, summands=copies)


def _padding(call: Call) -> Lowered:
    def rule(input: Argument, pad: Any, mode: str = "constant", value: float | None = None) -> Operator:
        constant((pad, value), "the padding")
        if len(pad) > 2 * (input.value.dim() - 1):
            raise UnsupportedOperator("it pads the batch")
        return padded(pad, mode, value or 0.0)

    return call.read(rule)


def _constant_padding(call: Call) -> Lowered:
    """As torch.export writes it."""

    def rule(input: Argument, pad: Any, value: float = 0.0) -> Operator:
        return padded(pad, "constant", value)

    return call.read(rule)


def _conversion(call: Call) -> Lowered:
    """To a type or device, which may be the same; another type is refused where the graph is made."""
    return _of_first(call, SAME)


_aten = torch.ops.aten
_INDEX, _SLICE = (_aten.index.Tensor,), (_aten.slice.Tensor,)
_MOVED = (
    *("permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "flip", "fliplr", "rot90", "roll"),
    *("repeat", "tile", "repeat_interleave", "mT", "diagonal", "unfold", "tril", "triu"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "im2col"),
)
_SELECTED = ("select", "index_select", "narrow", "slice", "take_along_dim")
_RESHAPED = (
    *("flatten", "unflatten", "reshape", "view", "reshape_as", "view_as", "ravel", "squeeze", "unsqueeze"),
    *("_unsafe_view", "squeeze_copy", "view_copy"),
)
_CONVERTED = (
    *("contiguous", "clone", "alias", "positive", "lift_fresh_copy", "to", "float", "double", "type", "type_as"),
    *("half", "bfloat16", "int", "long", "cpu", "cuda", "_to_copy"),
)
MOVES: Rows = [
    (_moving, [*spelled(*_MOVED), getattr]),
    (_selection, [python.getitem, *spelled(*_SELECTED), _aten.index]),
    (_spreading, spelled("expand", "expand_as", "broadcast_to")),
    (_reshaping, spelled(*_RESHAPED)),
    (_several, spelled("split", "chunk", "unbind", "tensor_split", "split_with_sizes", "hsplit")),
    (_concatenation, spelled("cat", "concat", "concatenate")),
    (_stack, spelled("stack")),
    (partial(_summing, mean=False), spelled("sum")),
    (partial(_summing, mean=True), spelled("mean")),
    (_padding, spelled("pad")),
    (_constant_padding, spelled("constant_pad_nd")),
    (_conversion, [*spelled(*_CONVERTED), python.pos]),
]
