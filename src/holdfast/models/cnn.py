"""The plain convolutional networks of certified training: convolutions, then dense layers, ReLU between."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from holdfast.models.model import Model, Shape


class Conv(NamedTuple):
    """One convolution."""

    channels: int
    kernel: int
    stride: int
    padding: int


def convolutional(
    convolutions: list[Conv], dense: list[int], input_shape: Shape, num_classes: int
) -> list[nn.Module]:
    """Convolutions, flattening and dense layers with ReLU between.

    Raises:
        ValueError: the images are too small to pass the convolutions.
    """
    channels, *size = input_shape
    layers: list[nn.Module] = []
    for conv in convolutions:
        layers += [nn.Conv2d(channels, conv.channels, conv.kernel, conv.stride, conv.padding), nn.ReLU()]
        channels = conv.channels
        size = [(side + 2 * conv.padding - conv.kernel) // conv.stride + 1 for side in size]
    if min(size) < 1:
        raise ValueError(
            f"images of {input_shape[1]} × {input_shape[2]} are too small for {len(convolutions)} convolutions"
        )
    layers.append(nn.Flatten())
    width = channels * size[0] * size[1]
    for following in dense:
        layers += [nn.Linear(width, following), nn.ReLU()]
        width = following
    return [*layers, nn.Linear(width, num_classes)]


class CNNSmall(Model, name="cnn-small"):
    """Two convolutions (16, 32; 4 × 4, stride 2) and 100 hidden units: "small" of Wong & Kolter (2018).

    166,406 parameters on MNIST, 214,918 on CIFAR-10.
    """

    def layers(self, input_shape: Shape, num_classes: int) -> list[nn.Module]:
        return convolutional([Conv(16, 4, 2, 1), Conv(32, 4, 2, 1)], [100], input_shape, num_classes)


class CNN4C3F(Model, name="cnn-4c3f"):
    """Four convolutions (32, 32, 64, 64) and three dense layers (512, 512, K): "large" of Wong et al. (2018).

    1,974,762 parameters on MNIST, 2,466,858 on CIFAR-10.
    """

    def layers(self, input_shape: Shape, num_classes: int) -> list[nn.Module]:
        convolutions = [Conv(32, 3, 1, 1), Conv(32, 4, 2, 1), Conv(64, 3, 1, 1), Conv(64, 4, 2, 1)]
        return convolutional(convolutions, [512, 512], input_shape, num_classes)
