"""Model: an architecture as a component of a recipe."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field
from torch import nn

from holdfast import foreign
from holdfast.component import Component, Settings
from holdfast.layers import Normalize
from holdfast.models.weights import load_weights

Shape = tuple[int, int, int]


class Normalization(Settings):
    """What the first layer subtracts and divides by, one number per channel."""

    mean: list[float]
    """Per channel, in input units."""
    std: list[float]
    """Per channel, in input units."""


class Model(Component, family="models"):
    """A classifier from images in [0, 1] to logits."""

    normalize: Normalization | None = Field(default=None)
    """Normalisation as the first layer; none by default."""
    weights: Path | None = None
    """Begin with the weights of this file: safetensors, or a torch checkpoint; at random by default."""

    @classmethod
    def parse(cls, value: object) -> Self:
        """As every component; and in the place of a name ``timm:NAME``, or ``package.module:factory``."""
        settings = {"name": value} if isinstance(value, str) else value
        if isinstance(settings, Mapping) and foreign.is_path(str(settings.get("name"))):
            path = str(settings["name"])
            source, _, name = path.partition(":")
            if source == "timm":
                settings = {**settings, "name": "timm", "architecture": name}
            elif not foreign.only_looking() and not _is_component(foreign.fetch(path)):
                settings = {**settings, "name": "factory", "path": path}
        return super().parse(settings)

    @abstractmethod
    def network(self, input_shape: Shape, num_classes: int) -> nn.Module:
        """The network behind the normalisation, freshly initialised."""

    def build(self, input_shape: Shape, num_classes: int) -> nn.Module:
        """A freshly initialised network for images (C, H, W).

        With a normalisation it is a Sequential of ``normalize`` and ``network``, the bare network otherwise.

        Raises:
            ValueError: the images are too small for the network, the normalisation has other channels, or the
                weights do not fit.
            FileNotFoundError: the weights are not there.
        """
        if self.weights is not None and not self.weights.is_file():
            raise FileNotFoundError(f"there is no file {self.weights}")
        if self.normalize is not None and len(self.normalize.mean) != input_shape[0]:
            raise ValueError(f"normalize has {len(self.normalize.mean)} channels, the images {input_shape[0]}")
        model = self.network(input_shape, num_classes)
        if self.normalize is not None:
            first = Normalize(self.normalize.mean, self.normalize.std)
            model = nn.Sequential(OrderedDict(normalize=first, network=model))
        if self.weights is not None:
            load_weights(model, self.weights)
        return model


def _is_component(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, Component)


def build(name: str, *, input_shape: Shape, num_classes: int, **settings: Any) -> nn.Module:
    """A freshly initialised network: ``build("cnn-4c3f", input_shape=(1, 28, 28), num_classes=10)``.

    Args:
        name: a registered model, ``timm:NAME``, or ``package.module:factory``.
        settings: those of the model's component.

    Raises:
        ValueError: unknown name or setting.
    """
    return Model.parse({"name": name, **settings}).build(input_shape, num_classes)
