"""The door of whatever takes a model, inputs and labels: how it is called makes no difference."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")


def door(function: Callable[P, R]) -> Callable[P, R]:
    """A function of a model, inputs and labels that answers alike however it is called.

    A caller's ``no_grad`` or ``inference_mode`` ends here; arrays, and labels in lists, become tensors; what is no
    module is refused. Arguments are known by their names: ``model``; ``x``, ``images`` or ``features``; ``y`` or
    ``labels``.
    """
    return _door(function, lambda: True)


def quiet_door(function: Callable[P, R]) -> Callable[P, R]:
    """``door``, but what it returns can be differentiated only if the caller has not said ``no_grad``."""
    return _door(function, torch.is_grad_enabled)


def side_door(function: Callable[P, R]) -> Callable[P, R]:
    """``door`` of a method that is called in every step of a training: who comes with gradients, a module and
    tensors (labels of int64, or probabilities), in this order, walks in."""
    through = door(function)

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        model, x, y = args[1:4] if len(args) > 3 else (None, None, None)
        plain = torch.is_grad_enabled() and isinstance(model, nn.Module) and isinstance(x, Tensor)
        plain = plain and isinstance(y, Tensor) and (y.dtype == torch.int64 or y.is_floating_point())
        return (function if plain else through)(*args, **kwargs)

    return inside


def _door(function: Callable[P, R], differentiates: Callable[[], bool]) -> Callable[P, R]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        graph = differentiates()
        with torch.inference_mode(False), torch.set_grad_enabled(graph):
            given = signature.bind(*args, **kwargs)
            for name, taken in _TAKEN.items():
                if name in given.arguments:
                    given.arguments[name] = taken(given.arguments[name])
            return function(*given.args, **given.kwargs)

    return inside


def as_module(model: object) -> nn.Module:
    """The model, or where it was made in inference mode a copy that gradients can pass.

    Raises:
        ValueError: it is no module, or one that was exported for batches of one size.
    """
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        remedy = "wrap it in a module whose forward calls it, and register the network that it asks as a submodule"
        if isinstance(model, type):
            remedy = "build it first"
        elif isinstance(owner := getattr(model, "__self__", None), nn.Module):
            remedy = f"give the {type(owner).__name__} itself"
        elif isinstance(model, torch.export.ExportedProgram):
            remedy = "give what its .module() returns"
        raise ValueError(f"expected a torch.nn.Module from inputs to logits, given {kind}; {remedy}")
    for module in _asked_whole(model):
        if isinstance(module, torch.fx.GraphModule) and (size := fixed_batch(module.graph)) is not None:
            raise ValueError(
                f"the model was exported for batches of {size} and takes no others; export it with "
                "dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), or put it into "
                f"holdfast.layers.InPieces(model, {size})"
            )
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        return copy.deepcopy(model)
    return model


def _asked_whole(model: nn.Module) -> Iterator[nn.Module]:
    """The submodules that are given a batch as it comes, not in pieces (``holdfast.layers.InPieces``)."""
    yield model
    if type(model).__name__ != "InPieces":
        for child in model.children():
            yield from _asked_whole(child)


def fixed_batch(graph: torch.fx.Graph) -> int | None:
    """The number of examples that the input of an exported graph has, if it is a number."""
    inputs = [node.meta.get("val") for node in graph.nodes if node.op == "placeholder"]
    shapes = [value.shape for value in inputs if isinstance(value, Tensor) and value.dim()]
    return shapes[-1][0] if shapes and isinstance(shapes[-1][0], int) else None


def as_inputs(x: object) -> Tensor:
    """A batch of inputs as a tensor, from that or from an array.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(x, Tensor):
        if not hasattr(x, "__array__"):
            raise ValueError(f"expected inputs (N, ...) as one tensor or array, given a {type(x).__name__}")
        x = _from_array(np.array(x), "inputs")
    return x.clone() if x.is_inference() else x


def as_labels(y: object) -> Tensor:
    """Labels as a tensor, from that, an array or a sequence; integers as int64.

    Raises:
        ValueError: they are something else, or no numbers.
    """
    if not isinstance(y, Tensor):
        if not (hasattr(y, "__array__") or isinstance(y, list | tuple | range)):
            raise ValueError(
                f"expected labels (N,) as a tensor, array or list of integers, given a {type(y).__name__}"
            )
        y = _from_array(np.array(y, dtype=None if len(y) else np.int64), "labels")  # type: ignore[arg-type]
    y = y.clone() if y.is_inference() else y
    return y if y.is_floating_point() or y.dtype == torch.bool else y.long()


def _from_array(array: np.ndarray, what: str) -> Tensor:
    try:
        return torch.from_numpy(array)
    except TypeError as fault:
        raise ValueError(f"expected {what} as numbers, given an array of {array.dtype}") from fault


_TAKEN: dict[str, Callable[[Any], Any]] = {
    "model": as_module,
    "x": as_inputs,
    "images": lambda x: as_inputs(x).detach(),
    "features": as_inputs,
    "y": as_labels,
    "labels": as_labels,
}
