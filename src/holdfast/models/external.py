"""Networks from elsewhere: timm, or any importable factory."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field
from torch import nn

from holdfast import foreign
from holdfast.models.model import Model, Shape


class Timm(Model, name="timm"):
    """A network of the timm library by its name there, freshly initialised (needs holdfast[zoo])."""

    architecture: str
    """The name in timm, such as ``resnet18``."""

    def network(self, input_shape: Shape, num_classes: int) -> nn.Module:
        try:
            import timm
        except Exception as fault:  # a broken torchvision fails in many ways
            raise ValueError(f"timm cannot be imported ({fault}); install holdfast[zoo]") from fault
        if not timm.is_model(self.architecture):
            near = timm.list_models(f"*{self.architecture}*")[:5]
            raise ValueError(f"{self.architecture!r} is not a network of timm; near: {', '.join(near) or 'none'}")
        model: nn.Module = timm.create_model(self.architecture, in_chans=input_shape[0], num_classes=num_classes)
        return model


class Factory(Model, name="factory"):
    """Whatever an importable function returns, or a module class: ``path: package.module:function``.

    It takes ``input_shape`` and ``num_classes``, or one of them, or nothing, and the arguments below.
    """

    path: str
    """``package.module:function``, or the name of a class of modules."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments."""

    @property
    def imported_paths(self) -> tuple[str, ...]:
        return (self.path,)

    @property
    def short_name(self) -> str:
        return foreign.short_name(self.path)

    def network(self, input_shape: Shape, num_classes: int) -> nn.Module:
        factory = foreign.fetch(self.path)
        positional, by_name = self._call(factory, {"input_shape": input_shape, "num_classes": num_classes})
        try:
            model = factory(*positional, **by_name)
        except Exception as fault:  # whatever somebody else's code raises
            text = " ".join(str(fault).split())
            raise ValueError(f"{self.path!r} raises {type(fault).__name__}{f': {text}' if text else ''}") from fault
        if not isinstance(model, nn.Module):
            raise ValueError(f"{self.path!r} returned {type(model).__name__}, not a module")
        return model

    def _call(self, factory: Any, known: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """What a factory is called with: as much of what is known as it takes, by name where it gives it one.

        Raises:
            ValueError: it is no function, or needs other arguments.
        """
        if isinstance(factory, nn.Module) or not callable(factory):
            raise ValueError(f"{self.path!r} is {type(factory).__name__}, not a function that returns a module")
        if isinstance(factory, type) and factory.__init__ is nn.Module.__init__:  # type: ignore[misc]
            return [], self.arguments
        try:
            signature = inspect.signature(factory)
        except (TypeError, ValueError):  # some that are written in C tell nothing
            return [], {**known, **self.arguments}
        for positional, by_name in _WAYS:
            call = [known[name] for name in positional], {name: known[name] for name in by_name} | self.arguments
            if _fits(signature, positional, call[1]):
                return call
        raise ValueError(
            f"{self.path!r} takes {signature}, expected (input_shape, num_classes), (num_classes) or nothing, and "
            f"whatever else as model.arguments"
        )


_WAYS = (
    ((), ("input_shape", "num_classes")),
    ((), ("num_classes",)),
    ((), ("input_shape",)),
    (("input_shape", "num_classes"), ()),
    (("input_shape",), ("num_classes",)),
    (("num_classes",), ()),
    (("input_shape",), ()),
    ((), ()),
)
"""How a factory may be called, the fullest first: what goes by position, and what by name."""


def _fits(signature: inspect.Signature, positional: Sequence[str], by_name: Mapping[str, Any]) -> bool:
    """Whether it can be called so; by position goes only what has no other name there, and must be given."""
    try:
        signature.bind(*positional, **by_name)
    except TypeError:
        return False
    taken = list(signature.parameters.values())
    for place, name in enumerate(positional):
        one = taken[min(place, len(taken) - 1)]
        if one.kind is one.POSITIONAL_ONLY and one.name != name:
            strange = one.name not in ("input_shape", "num_classes") and one.default is one.empty
            if not strange:
                return False
        elif one.kind not in (one.POSITIONAL_ONLY, one.VAR_POSITIONAL):
            return False
    return True
