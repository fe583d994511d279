"""A traced call of a function, with what it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree

from holdfast.bounds.interval import Interval, rule
from holdfast.bounds.operators import Operator, apply


@dataclass(frozen=True)
class Argument:
    """Stands for an activation among the arguments of a traced call."""

    value: Tensor


@dataclass(frozen=True)
class Call:
    """A traced call: the function, its arguments with activations wrapped in ``Argument``, and its result."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Tensor

    @property
    def activation(self) -> Tensor:
        """The first activation among the arguments."""
        return next(a.value for a in (*self.args, *self.kwargs.values()) if isinstance(a, Argument))

    def __call__(self, x: Tensor) -> Tensor:
        """The same call with x in the place of its only activation."""
        args, kwargs = _pytree.tree_map(lambda a: x if isinstance(a, Argument) else a, (self.args, self.kwargs))
        result: Tensor = self.function(*args, **kwargs)
        return result


Rows = list[tuple[Callable[[Call], Operator], list[Any]]]
"""Rules, and the functions whose calls they read."""


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


TRACED_THROUGH: set[type[nn.Module]] = {nn.PReLU, nn.LayerNorm, nn.RMSNorm}
"""Modules of torch whose forward is one call that has a rule."""
