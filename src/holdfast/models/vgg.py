"""VGG with BatchNorm, for any image size."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from holdfast.models.model import Model, Shape


class VGGNet(nn.Module):
    """3 × 3 convolutions with BatchNorm and ReLU in five widths, a pooling after each, one linear classifier.

    A pooling that the image is too small for is left out, and the last one averages whatever is left.
    """

    def __init__(self, repeats: tuple[int, ...], input_shape: Shape, num_classes: int) -> None:
        super().__init__()
        channels, *size = input_shape
        side, layers = min(size), []
        if side < 16:
            raise ValueError(f"images of {size[0]} × {size[1]} are too small for VGG")
        for width, repeat in zip((64, 128, 256, 512, 512), repeats, strict=True):
            for _ in range(repeat):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            if side >= 4:
                layers.append(nn.MaxPool2d(2))
                side //= 2
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(512, num_classes)
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, (2 / (9 * module.in_channels)) ** 0.5)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.classifier.weight, 0, 0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))


class _VGG(Model):
    """A depth of VGG."""

    repeats: ClassVar[tuple[int, ...]]

    def network(self, input_shape: Shape, num_classes: int) -> nn.Module:
        return VGGNet(self.repeats, input_shape, num_classes)


class VGG11(_VGG, name="vgg11-bn"):
    """VGG-11 with BatchNorm and one linear classifier (Simonyan & Zisserman, 2015); 9,231,114 parameters.

    State-dict keys are those of the neural-collapse line.
    """

    repeats = (1, 1, 2, 2, 2)


class VGG13(_VGG, name="vgg13-bn"):
    """VGG-13 with BatchNorm and one linear classifier."""

    repeats = (2, 2, 2, 2, 2)


class VGG16(_VGG, name="vgg16-bn"):
    """VGG-16 with BatchNorm and one linear classifier."""

    repeats = (2, 2, 3, 3, 3)


class VGG19(_VGG, name="vgg19-bn"):
    """VGG-19 with BatchNorm and one linear classifier."""

    repeats = (2, 2, 4, 4, 4)
