"""Networks from elsewhere: timm, or any importable factory."""

from __future__ import annotations

import importlib
from typing import Any

from pydantic import Field
from torch import nn

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
    """Whatever an importable function returns: ``path: package.module:function``."""

    path: str
    """``package.module:function``; called with input_shape and num_classes, and the arguments below."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments."""

    def network(self, input_shape: Shape, num_classes: int) -> nn.Module:
        module, separator, name = self.path.partition(":")
        if not separator:
            raise ValueError(f"expected package.module:function, given {self.path!r}")
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as fault:
            raise ValueError(f"{self.path!r} cannot be imported: {fault}") from fault
        model = function(input_shape=input_shape, num_classes=num_classes, **self.arguments)
        if not isinstance(model, nn.Module):
            raise ValueError(f"{self.path!r} returned {type(model).__name__}, not a module")
        return model
