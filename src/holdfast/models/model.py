"""Model: an architecture as a component of a recipe."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from pydantic import Field
from torch import nn

from holdfast.component import Component, Settings
from holdfast.layers import Normalize

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

    @abstractmethod
    def layers(self, input_shape: Shape, num_classes: int) -> list[nn.Module]:
        """The network's layers, in order."""

    def build(self, input_shape: Shape, num_classes: int) -> nn.Sequential:
        """A freshly initialised network for images (C, H, W).

        Raises:
            ValueError: the images are too small for the network, or the normalisation has other channels.
        """
        first: list[nn.Module] = []
        if self.normalize:
            if len(self.normalize.mean) != input_shape[0]:
                raise ValueError(f"normalize has {len(self.normalize.mean)} channels, the images {input_shape[0]}")
            first = [Normalize(self.normalize.mean, self.normalize.std)]
        return nn.Sequential(*first, *self.layers(input_shape, num_classes))


def build(name: str, *, input_shape: Shape, num_classes: int, **settings: Any) -> nn.Module:
    """A freshly initialised network: ``build("cnn-4c3f", input_shape=(1, 28, 28), num_classes=10)``.

    Raises:
        ValueError: unknown name or setting.
    """
    return Model.parse({"name": name, **settings}).build(input_shape, num_classes)
