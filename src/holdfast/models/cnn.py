"""The plain convolutional networks of certified training: convolutions, then dense layers, ReLU between.

Weights are initialised as torch does by default. Any input size that survives the strides will do.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from pydantic import PositiveInt
from torch import nn

from holdfast.models.model import Model, Shape


class Conv(NamedTuple):
    """One convolution."""

    channels: int
    kernel: int
    stride: int = 1
    padding: int = 1


def convolutional(
    convolutions: list[Conv],
    dense: list[int],
    input_shape: Shape,
    num_classes: int,
    *,
    batch_norm: bool = False,
) -> nn.Sequential:
    """Convolutions, flattening and dense layers with ReLU between; BatchNorm before each ReLU if asked for.

    Raises:
        ValueError: the images are too small to pass the convolutions.
    """
    channels, *size = input_shape
    layers: list[nn.Module] = []
    for conv in convolutions:
        layers.append(nn.Conv2d(channels, conv.channels, conv.kernel, conv.stride, conv.padding))
        layers += [nn.BatchNorm2d(conv.channels), nn.ReLU()] if batch_norm else [nn.ReLU()]
        channels = conv.channels
        size = [(side + 2 * conv.padding - conv.kernel) // conv.stride + 1 for side in size]
        if min(size) < 1:
            given = f"{input_shape[1]} × {input_shape[2]}"
            raise ValueError(f"images of {given} are too small for {len(convolutions)} convolutions")
    layers.append(nn.Flatten())
    width = channels * size[0] * size[1]
    for following in dense:
        layers.append(nn.Linear(width, following))
        layers += [nn.BatchNorm1d(following), nn.ReLU()] if batch_norm else [nn.ReLU()]
        width = following
    return nn.Sequential(*layers, nn.Linear(width, num_classes))


class _PlainCNN(Model):
    """A fixed list of layers."""

    convolutions: ClassVar[list[Conv]]
    dense: ClassVar[list[int]]
    batch_norm: ClassVar[bool] = False

    def network(self, input_shape: Shape, num_classes: int) -> nn.Module:
        return convolutional(self.convolutions, self.dense, input_shape, num_classes, batch_norm=self.batch_norm)


class CNNSmall(_PlainCNN, name="cnn-small"):
    """Two convolutions (16, 32; 4 × 4, stride 2) and 100 hidden units: "small" of Wong & Kolter (2018).

    166,406 parameters on MNIST, 214,918 on CIFAR-10.
    """

    convolutions = [Conv(16, 4, 2), Conv(32, 4, 2)]
    dense = [100]


class CNN4C3F(_PlainCNN, name="cnn-4c3f"):
    """Four convolutions (32, 32, 64, 64) and three dense layers (512, 512, K): "large" of Wong et al. (2018).

    1,974,762 parameters on MNIST, 2,466,858 on CIFAR-10.
    """

    convolutions = [Conv(32, 3), Conv(32, 4, 2), Conv(64, 3), Conv(64, 4, 2)]
    dense = [512, 512]


class CNN6C2F(_PlainCNN, name="cnn-6c2f"):
    """Six convolutions and two dense layers (Lee et al., 2020); 2,250,378 parameters on CIFAR-10."""

    convolutions = [Conv(32, 3), Conv(32, 3), Conv(32, 4, 2), Conv(64, 3), Conv(64, 3), Conv(64, 4, 2)]
    dense = [512]


class CNN8C2F(_PlainCNN, name="cnn-8c2f"):
    """Eight convolutions and two dense layers, for Tiny ImageNet (Lee et al., 2020)."""

    convolutions = [
        *[Conv(64, 3), Conv(64, 3), Conv(64, 4, 2, 0)],
        *[Conv(128, 3), Conv(128, 3), Conv(128, 4, 2)],
        *[Conv(256, 3), Conv(256, 4, 2)],
    ]
    dense = [256]


class DMLarge(_PlainCNN, name="dm-large"):
    """Five convolutions and 512 hidden units: "large" of Gowal et al. (2018).

    13,257,290 parameters on MNIST, 17,190,602 on CIFAR-10.
    """

    convolutions = [Conv(64, 3), Conv(64, 3), Conv(128, 3, 2), Conv(128, 3), Conv(128, 3)]
    dense = [512]


class CNN7(_PlainCNN, name="cnn7"):
    """The layers of ``dm-large`` with BatchNorm before every ReLU: CNN7 of Shi et al. (2021)."""

    convolutions = DMLarge.convolutions
    dense = DMLarge.dense
    batch_norm = True


class _CNNFamily(Model):
    """A plain network of the certified line whose width can be set."""

    width: PositiveInt = 8
    """Multiplies the number of channels of every convolution."""
    linear_size: PositiveInt = 512
    """Width of the hidden dense layers."""


class CNN1Layer(_CNNFamily, name="cnn-1layer"):
    """One convolution (8 w; 4 × 4, stride 4) and a dense layer."""

    def network(self, input_shape: Shape, num_classes: int) -> nn.Module:
        return convolutional([Conv(8 * self.width, 4, 4, 0)], [], input_shape, num_classes)


class CNN2Layer(_CNNFamily, name="cnn-2layer"):
    """Two convolutions (4 w, 8 w; 4 × 4, stride 2) and two dense layers."""

    def network(self, input_shape: Shape, num_classes: int) -> nn.Module:
        convolutions = [Conv(4 * self.width, 4, 2), Conv(8 * self.width, 4, 2)]
        return convolutional(convolutions, [self.linear_size], input_shape, num_classes)


class CNN3Layer(_CNNFamily, name="cnn-3layer"):
    """Three convolutions (4 w, 8 w, 8 w; the last 4 × 4 with stride 4) and two dense layers."""

    kernel: PositiveInt = 3
    """Size of the first two kernels: 3 or 5."""

    def network(self, input_shape: Shape, num_classes: int) -> nn.Module:
        w = self.width
        convolutions = [Conv(4 * w, self.kernel), Conv(8 * w, self.kernel), Conv(8 * w, 4, 4, 0)]
        return convolutional(convolutions, [self.linear_size], input_shape, num_classes)


class CNN4Layer(_CNNFamily, name="cnn-4layer"):
    """Four convolutions (4 w, 4 w, 8 w, 8 w) and three dense layers; width 8 is ``cnn-4c3f``."""

    def network(self, input_shape: Shape, num_classes: int) -> nn.Module:
        w = self.width
        convolutions = [Conv(4 * w, 3), Conv(4 * w, 4, 2), Conv(8 * w, 3), Conv(8 * w, 4, 2)]
        return convolutional(convolutions, [self.linear_size] * 2, input_shape, num_classes)


class CNN10Layer(_CNNFamily, name="cnn-10layer"):
    """Eight convolutions, 3 × 3 and 2 × 2 with stride 2 in turns (4 w … 64 w), and two dense layers."""

    def network(self, input_shape: Shape, num_classes: int) -> nn.Module:
        shares = [4, 8, 8, 16, 16, 32, 32, 64]
        convolutions = [
            Conv(share * self.width, 2, 2, 0) if number % 2 else Conv(share * self.width, 3)
            for number, share in enumerate(shares)
        ]
        return convolutional(convolutions, [self.linear_size], input_shape, num_classes)
