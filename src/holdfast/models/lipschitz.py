"""1-Lipschitz networks: ``aol-mlp``, ``aol-lcn``, ``cpl-lcn``, ``lipschitz-convnet``; and ``liresnet``.

Their convolutions keep the size of the image, their blocks halve it by turning pixels into channels. Images of
other sides than multiples of 2^blocks get a frame of zeros first, which changes no distance.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, Field, PositiveInt
from torch import nn

from holdfast import foreign
from holdfast.component import nearest
from holdfast.layers import (
    AOLConv2d,
    AOLLinear,
    BCOPConv2d,
    BjorckLinear,
    BROConv2d,
    BROLinear,
    CayleyConv2d,
    CayleyLinear,
    CPLConv2d,
    CPLLinear,
    FirstChannels,
    LinearResidualConv2d,
    LipschitzLayer,
    LOTConv2d,
    MaxMin,
    NormalizedLinear,
    SandwichConv2d,
    SLLConv2d,
    SOCConv2d,
    ZeroChannelConcatenation,
)
from holdfast.models.model import Model, Shape

_CONVOLUTIONS: dict[str, type[LipschitzLayer]] = {
    "aol": AOLConv2d,
    "bcop": BCOPConv2d,
    "bro": BROConv2d,
    "cayley": CayleyConv2d,
    "cpl": CPLConv2d,
    "lot": LOTConv2d,
    "sandwich": SandwichConv2d,
    "sll": SLLConv2d,
    "soc": SOCConv2d,
}


_HEADS: dict[str, Callable[[int, int], LipschitzLayer]] = {
    "bcop": BjorckLinear,
    "bro": BROLinear,
    "cayley": CayleyLinear,
}
"""The last layer that goes with a convolution, where that is not a convolution itself."""


def _known_layer(name: str) -> str:
    if name not in _CONVOLUTIONS and not foreign.is_path(name):
        raise ValueError(f"{name!r} is not one of the layers; {nearest(name, _CONVOLUTIONS)}")
    return name


Layer = Annotated[str, AfterValidator(_known_layer)]
"""A convolution by its name, or as ``package.module:Class``."""


def _convolution(name: str) -> Any:
    """The class of a layer.

    Raises:
        ValueError: it cannot be imported, or is no 1-Lipschitz layer.
    """
    kind = foreign.fetch(name) if foreign.is_path(name) else _CONVOLUTIONS[name]
    if not (isinstance(kind, type) and issubclass(kind, LipschitzLayer)):
        raise ValueError(f"{name!r} is not one of the layers: expected a class of holdfast.layers.LipschitzLayer")
    return kind


_WIDTHS = {"XS": 16, "S": 32, "M": 64, "L": 128}


class _Frame(NamedTuple):
    """What comes before the first convolution."""

    layers: list[nn.Module]
    side: int
    """Of the image behind it."""


def _frame(input_shape: Shape, blocks: int, width: int) -> _Frame:
    """Zeros around the image up to a square that the blocks can halve, and channels of zeros up to the width."""
    if input_shape[0] > width:
        raise ValueError(f"images of {input_shape[0]} channels are wider than the first layer's {width}")
    frame = _square(input_shape, 2**blocks)
    return frame._replace(layers=[*frame.layers, ZeroChannelConcatenation(width)])


def _square(input_shape: Shape, unit: int) -> _Frame:
    """Zeros around the image up to the next square whose side is a multiple of the unit."""
    _, high, wide = input_shape
    side = -(-max(high, wide) // unit) * unit
    missing = side - wide, side - high
    frame = nn.ZeroPad2d((missing[0] // 2, -(-missing[0] // 2), missing[1] // 2, -(-missing[1] // 2)))
    return _Frame([frame] if any(missing) else [], side)


def _blocks(layer: Callable[[int, int], nn.Module], width: int, kernels: list[int], depth: int) -> list[nn.Module]:
    """A block of ``depth`` convolutions for each kernel size; it ends at half the side and twice the width."""
    parts: list[nn.Module] = []
    for kernel in kernels:
        for _ in range(depth):
            parts += [layer(width, kernel), MaxMin()]
        parts += [FirstChannels(width // 2), nn.PixelUnshuffle(2)]
        width *= 2
    return parts


class AOLMLP(Model, name="aol-mlp"):
    """Dense AOL layers with MaxMin between (Prach & Lampert, 2024); 75,497,472 parameters for CIFAR-10."""

    width: PositiveInt = 3072
    """Of every layer; shorter inputs are filled up with zeros, the first layer of longer ones is wider."""
    depth: PositiveInt = 8
    """Dense layers, the last one included."""

    def network(self, input_shape: Shape, num_classes: int) -> nn.Module:
        if num_classes > self.width:
            raise ValueError(f"width={self.width} is less than the {num_classes} classes")
        width = max(math.prod(input_shape), self.width)
        layers: list[nn.Module] = [nn.Flatten(), ZeroChannelConcatenation(width)]
        for _ in range(self.depth):
            layers += [AOLLinear(width, self.width, bias=False), MaxMin()]
            width = self.width
        return nn.Sequential(*layers[:-1], FirstChannels(num_classes))


class _LCN(Model):
    """Lipschitz convolutional network (Prach & Lampert, 2024)."""

    base_width: int = Field(default=64, gt=0, multiple_of=2)
    """Channels of the first block, even; they double from block to block."""
    blocks: PositiveInt = 5
    """Each halves the side of the image."""
    block_depth: PositiveInt = 3
    """Convolutions in each block."""
    kernel_size: PositiveInt = 3
    """Odd; smaller images keep it, with zeros around them."""

    @abstractmethod
    def convolution(self, width: int, kernel: int) -> nn.Module:
        """A convolution that keeps its width."""

    @abstractmethod
    def dense(self, width: int) -> nn.Module:
        """A dense layer that keeps its width."""

    def network(self, input_shape: Shape, num_classes: int) -> nn.Module:
        first, side = _frame(input_shape, self.blocks, self.base_width)
        parts = [*first, self.convolution(self.base_width, 1), MaxMin()]
        parts += _blocks(self.convolution, self.base_width, [self.kernel_size] * self.blocks, self.block_depth)
        width = self.base_width * 2**self.blocks
        if num_classes > width:
            raise ValueError(f"{num_classes} classes are more than the last layer's {width}")
        pool = nn.MaxPool2d(side // 2**self.blocks)
        return nn.Sequential(*parts, pool, nn.Flatten(), self.dense(width), FirstChannels(num_classes))


class AOLLCN(_LCN, name="aol-lcn"):
    """Convolutional network of AOL layers without biases; 41,910,272 parameters for CIFAR-10."""

    def convolution(self, width: int, kernel: int) -> nn.Module:
        return AOLConv2d(width, width, kernel, bias=False)

    def dense(self, width: int) -> nn.Module:
        return AOLLinear(width, width, bias=False)


class CPLLCN(_LCN, name="cpl-lcn"):
    """Convolutional network of convex potential layers; 41,918,336 parameters for CIFAR-10."""

    def convolution(self, width: int, kernel: int) -> nn.Module:
        return CPLConv2d(width, width, kernel)

    def dense(self, width: int) -> nn.Module:
        return CPLLinear(width, width)


class LipschitzConvNet(Model, name="lipschitz-convnet"):
    """The network on which Prach et al. (2024) compare 1-Lipschitz layers: 5 blocks of 5 convolutions.

    1,572,288 parameters in size XS, about four times as many in each next size.
    """

    layer: Layer = "aol"
    """Which convolution: aol, bcop, cayley, cpl, lot, sandwich, sll, soc, or ``package.module:Class``."""
    size: Literal["XS", "S", "M", "L"] = "XS"
    """First width 16, 32, 64 or 128."""
    blocks: PositiveInt = Field(default=5, ge=2)
    """Each halves the side of the image; the last has 1 × 1 kernels."""
    block_depth: PositiveInt = 5
    """Convolutions in each block."""
    normalized_head: bool = False
    """End in a layer with rows of length 1, certified by pairs of classes."""

    @property
    def imported_paths(self) -> tuple[str, ...]:
        return (*super().imported_paths, *([self.layer] if foreign.is_path(self.layer) else []))

    def network(self, input_shape: Shape, num_classes: int) -> nn.Module:
        width = _WIDTHS[self.size]
        first = _frame(input_shape, self.blocks, width).layers
        kind = _convolution(self.layer)

        def layer(channels: int, kernel: int) -> nn.Module:
            convolution: nn.Module = kind(channels, channels, kernel)
            return convolution

        parts = [*first, self._ends(layer(width, 1)), MaxMin()]
        parts += _blocks(layer, width, [3] * (self.blocks - 1) + [1], self.block_depth)
        parts.append(nn.AdaptiveMaxPool2d(1))
        last = width * 2**self.blocks
        if num_classes > last:
            raise ValueError(f"{num_classes} classes are more than the last layer's {last}")
        if self.normalized_head:
            return nn.Sequential(*parts, nn.Flatten(), NormalizedLinear(last, num_classes))
        if self.layer in _HEADS:
            head: nn.Module = _HEADS[self.layer](last, last)
            return nn.Sequential(*parts, nn.Flatten(), head, FirstChannels(num_classes))
        return nn.Sequential(*parts, self._ends(layer(last, 1)), nn.Flatten(), FirstChannels(num_classes))

    def _ends(self, layer: nn.Module) -> nn.Module:
        """AOL's first and last layer start orthogonal in place of the identity."""
        if isinstance(layer, AOLConv2d):
            nn.init.orthogonal_(layer.weight)
        return layer


class LiResNet(Model, name="liresnet"):
    """Linear residual convolutions with MaxMin, for training with ``gloro`` or ``lmt`` (after Hu et al., 2023).

    Its constant is not 1 but follows from the weights; certificates take verified norms of every layer.
    """

    width: PositiveInt = 32
    """Channels of the residual convolutions."""
    depth: PositiveInt = 4
    """Residual convolutions."""
    features: PositiveInt = 256
    """Width of the layer before the head."""

    def network(self, input_shape: Shape, num_classes: int) -> nn.Module:
        channels, high, wide = input_shape
        if min(high, wide) < 8:
            raise ValueError(f"images of {high} × {wide} are too small for liresnet")
        parts: list[nn.Module] = [nn.Conv2d(channels, self.width, 5, 2, 2), MaxMin()]
        for _ in range(self.depth):
            parts += [LinearResidualConv2d(self.width, self.width), MaxMin()]
        sides = [(side + 1) // 2 // 4 for side in (high, wide)]
        parts += [nn.Conv2d(self.width, 2 * self.width, 4, 4), MaxMin(), nn.Flatten()]
        parts += [nn.Linear(2 * self.width * sides[0] * sides[1], self.features), MaxMin()]
        return nn.Sequential(*parts, nn.Linear(self.features, num_classes))


class BRONet(Model, name="bronet"):
    """Block-reflector convolutions with MaxMin, for training with ``logit-annealing`` (after Lai et al., 2025).

    All layers are 1-Lipschitz. Three strides make an eighth of the side and twice the channels; a dense block
    reflector and a normalised head follow.
    """

    width: PositiveInt = 64
    """Channels of the convolutions."""
    depth: PositiveInt = 4
    """Convolutions at the inner resolution."""
    features: PositiveInt = 256
    """Width of the layer before the head."""

    def network(self, input_shape: Shape, num_classes: int) -> nn.Module:
        frame = _square(input_shape, 8)
        parts = [*frame.layers, BROConv2d(input_shape[0], self.width, 3, stride=2), MaxMin()]
        for _ in range(self.depth):
            parts += [BROConv2d(self.width, self.width, 3), MaxMin()]
        parts += [BROConv2d(self.width, 2 * self.width, 1, stride=2), MaxMin()]
        parts += [BROConv2d(2 * self.width, 2 * self.width, 1, stride=2), MaxMin(), nn.Flatten()]
        parts += [BROLinear(2 * self.width * (frame.side // 8) ** 2, self.features), MaxMin()]
        return nn.Sequential(*parts, NormalizedLinear(self.features, num_classes))
