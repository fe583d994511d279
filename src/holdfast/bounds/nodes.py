"""What is read off the calls of a traced forward: where they stand, what they are called, what they follow from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

_SHAPE_METHODS = {"size", "dim", "ndimension", "numel", "__len__", "is_floating_point"}
_SHAPE_FUNCTIONS = {len, torch.numel, torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default}


def read_by(ends: Iterator[fx.Node]) -> set[fx.Node]:
    """These nodes and all that they follow from."""
    read: set[fx.Node] = set()
    pending = list(ends)
    while pending:
        node = pending.pop()
        if node not in read:
            read.add(node)
            pending += node.all_input_nodes
    return read


def asks_for_shape(n: fx.Node) -> bool:
    """Whether a call returns the shape of an activation, not something computed from its values."""
    if n.op == "call_function" and n.target is getattr:
        return n.args[1] in ("shape", "dtype", "device", "ndim")
    return n.target in (_SHAPE_METHODS if n.op == "call_method" else _SHAPE_FUNCTIONS)


def place_of(n: fx.Node) -> str:
    stack = n.meta.get("nn_module_stack")
    path = str(n.target) if n.op == "call_module" else (list(stack.values())[-1][0] if stack else "")
    return repr(path or "the module itself") + ("" if n.op == "call_module" else f" ({n.name})")


def name_of(kind: Any) -> str:
    """As somebody writes it who registers a rule."""
    if isinstance(kind, torch._ops.OpOverload):
        return f"torch.ops.{kind}"
    name: str = getattr(kind, "__name__", str(kind))
    method = getattr(kind, "__qualname__", "").startswith(("TensorBase.", "Tensor."))
    return f"torch.Tensor.{name}" if method else name


def remedy(name: str) -> str:
    return (
        f"operator {name} is unknown; holdfast.bounds.register({name}, rule) teaches it, for a function that "
        "increases in every input with the rule holdfast.bounds.Monotone"
    )
