"""A traced call of a function, with what it is given, and what a rule may make of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree

from holdfast.bounds.interval import Interval, rule
from holdfast.bounds.operators import Affine, Operator, Shape, UnsupportedOperator, apply, moved


@dataclass(frozen=True, eq=False)
class Argument:
    """Stands for an activation among the arguments of a traced call."""

    value: Tensor
    place: int = 0
    """How many activations come before it."""


@dataclass(frozen=True)
class Call:
    """A traced call: the function, its arguments with activations wrapped in ``Argument``, and its result."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    """A tensor, or several."""

    @property
    def activations(self) -> list[Argument]:
        """Those among the arguments, in order."""
        return [leaf for leaf in _pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Argument)]

    @property
    def activation(self) -> Tensor:
        """The first of them."""
        return self.activations[0].value

    def __call__(self, x: Tensor) -> Any:
        """The same call with x in the place of its only activation."""
        args, kwargs = _pytree.tree_map(lambda a: x if isinstance(a, Argument) else a, (self.args, self.kwargs))
        return self.function(*args, **kwargs)

    def read(self, rule: Callable[..., Lowered]) -> Lowered:
        """What a rule makes of the arguments, which it takes by the names that the function gives them.

        Raises:
            UnsupportedOperator: the call has others.
        """
        renamed = {_OTHER_NAMES.get(name, name): value for name, value in self.kwargs.items()}
        try:
            bound = inspect.signature(rule).bind(*self.args, **renamed)
        except TypeError as fault:
            raise UnsupportedOperator(f"called like this it has no rule: {fault}") from None
        return rule(*bound.args, **bound.kwargs)


_OTHER_NAMES = {"self": "input", "axis": "dim", "axes": "dim", "keepdims": "keepdim", "x1": "input", "x2": "other"}


@dataclass(frozen=True)
class Steps(Operator):
    """Several operators in the place of one call; a graph holds its steps."""

    steps: tuple[tuple[Operator, tuple[int, ...]], ...]
    """Each with the numbers of what it reads: the activations of the call in order, then results of steps."""


@apply.register
def _(operator: Steps, *values: Tensor) -> Tensor:
    found = [*values]
    for step, inputs in operator.steps:
        found.append(apply(step, *(found[i] for i in inputs)))
    return found[-1]


@rule.register
def _(operator: Steps, *values: Interval) -> Interval:
    found = [*values]
    for step, inputs in operator.steps:
        found.append(rule(step, *(found[i] for i in inputs)))
    return found[-1]


class Chain:
    """Steps in the making."""

    def __init__(self, call: Call) -> None:
        self.activations = len(call.activations)
        self.made: list[tuple[Operator, tuple[int, ...]]] = []

    def add(self, operator: Operator, *inputs: int) -> int:
        """The number of the result."""
        self.made.append((operator, inputs))
        return self.activations + len(self.made) - 1

    @property
    def steps(self) -> Steps:
        return Steps(tuple(self.made))


@dataclass(frozen=True)
class Several:
    """A call with several results, each by an operator or steps; None for one without a rule."""

    parts: tuple[Operator | None, ...]


Lowered = Operator | Several
"""What a rule makes of a call."""
Rows = list[tuple[Callable[[Call], Lowered], list[Any]]]
"""Rules, and the functions whose calls they read."""

TRACED_THROUGH: set[type[nn.Module]] = {nn.PReLU, nn.LayerNorm, nn.RMSNorm}
"""Modules of torch whose forward is one call that has a rule."""

SAME = moved(lambda x: x)
"""An operator that does nothing, and is left out of the graph."""


def spelled(*names: str) -> list[Any]:
    """All that a function of these names is in torch: function, method, operator of torch.export."""
    places = (torch, Tensor, F, torch.ops.aten)
    found = [getattr(place, name, None) for name in names for place in places]
    return [each for each in dict.fromkeys(found) if callable(each)]


def shaped(shape: Shape) -> Operator:
    """The entries in another shape of one example."""
    return moved(lambda x: x.reshape(len(x), *shape))


def spread_to(value: Tensor, shape: Shape) -> Operator:
    """A value repeated along dimensions of one, or along new ones, up to this shape of one example."""
    own = (*(1,) * (len(shape) + 1 - value.dim()), *value.shape[1:])
    copies = torch.Size(shape).numel() // max(1, value[0].numel())

    def spread(x: Tensor) -> Tensor:
        return x.reshape(len(x), *own).expand(len(x), *shape)

    return Affine(spread, spread, summands=copies)


def number(value: Any) -> bool:
    """Whether it is a plain number, and no activation or tensor."""
    return isinstance(value, int | float)


def constant(value: Any, what: str) -> None:
    """Refuse an activation, alone or in a list, where only constants have a rule."""
    if any(isinstance(leaf, Argument) for leaf in _pytree.tree_leaves(value)):
        raise UnsupportedOperator(f"{what} depends on the input, which has no rule")
