"""Residual networks: pre-activation (He et al., 2016b), bottleneck (2016a), for any image size."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from holdfast.models.model import Model, Shape

Stem = Literal["auto", "3x3", "7x7"]


def large_stem(stem: Stem, input_shape: Shape, threshold: int) -> bool:
    """Whether the image is first brought to a quarter of its side: where asked for, or from a size on."""
    return stem == "7x7" or (stem == "auto" and min(input_shape[1:]) >= threshold)


def stem_convolution(channels: int, width: int = 64, *, large: bool) -> nn.Conv2d:
    """The first convolution, 7 × 7 with stride 2 or 3 × 3."""
    kernel, stride, padding = (7, 2, 3) if large else (3, 1, 1)
    return nn.Conv2d(channels, width, kernel, stride, padding, bias=False)


class PreActBlock(nn.Module):
    """BN–ReLU–conv–BN–ReLU–conv; the shortcut convolves the activated input where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int, *, activated: bool = False) -> None:
        super().__init__()
        self.bn1 = nn.Identity() if activated else nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        changes = stride != 1 or channels != width
        self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False)) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        residual = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return residual + (x if self.shortcut is None else self.shortcut(activated))


class PreActBottleneck(nn.Module):
    """The pre-activation block of three convolutions, four times as wide at its end."""

    def __init__(self, channels: int, width: int, stride: int, *, activated: bool = False) -> None:
        super().__init__()
        self.bn1 = nn.Identity() if activated else nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        changes = stride != 1 or channels != 4 * width
        self.shortcut = nn.Sequential(nn.Conv2d(channels, 4 * width, 1, stride, bias=False)) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        residual = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        residual = self.conv3(F.relu(self.bn3(residual)))
        return residual + (x if self.shortcut is None else self.shortcut(activated))


class PreActResNet(nn.Module):
    """Four stages of pre-activation blocks behind a 3 × 3 stem, or a 7 × 7 one with BatchNorm and pooling."""

    def __init__(
        self,
        block: type[PreActBlock] | type[PreActBottleneck],
        repeats: tuple[int, ...],
        input_shape: Shape,
        num_classes: int,
        *,
        large: bool,
        first: int,
    ) -> None:
        super().__init__()
        self.conv1 = stem_convolution(input_shape[0], first, large=large)
        self.bn1 = nn.BatchNorm2d(first) if large else None
        channels, stages = first, []
        for stage, (width, repeat) in enumerate(
            zip((first, 2 * first, 4 * first, 8 * first), repeats, strict=True)
        ):
            blocks = []
            for number in range(repeat):
                stride = 2 if stage and not number else 1
                blocks.append(block(channels, width, stride, activated=large and stage == number == 0))
                channels = width * (4 if block is PreActBottleneck else 1)
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if self.bn1 is not None:
            x = F.max_pool2d(F.relu(self.bn1(x)), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = F.adaptive_avg_pool2d(F.relu(self.bn(x)), 1)
        return self.linear(torch.flatten(x, 1))


class _PreActResNet(Model):
    """A depth of the pre-activation residual network."""

    stem: Stem = "auto"
    """``3x3`` for small images, ``7x7`` with pooling for large ones; ``auto`` decides at 96 pixels."""
    width: PositiveInt = 64
    """Channels of the first stage; every further one has twice as many."""
    block: ClassVar[type[PreActBlock] | type[PreActBottleneck]] = PreActBlock
    repeats: ClassVar[tuple[int, ...]]

    def network(self, input_shape: Shape, num_classes: int) -> nn.Module:
        large = large_stem(self.stem, input_shape, 96)
        return PreActResNet(self.block, self.repeats, input_shape, num_classes, large=large, first=self.width)


class PreActResNet18(_PreActResNet, name="preact-resnet18"):
    """Pre-activation ResNet-18 (He et al., 2016b); 11,172,170 parameters on CIFAR-10.

    State-dict keys are those of the neural-collapse line.
    """

    repeats = (2, 2, 2, 2)


class PreActResNet34(_PreActResNet, name="preact-resnet34"):
    """Pre-activation ResNet-34."""

    repeats = (3, 4, 6, 3)


class PreActResNet50(_PreActResNet, name="preact-resnet50"):
    """Pre-activation ResNet-50, with bottlenecks."""

    block, repeats = PreActBottleneck, (3, 4, 6, 3)


class BasicBlock(nn.Module):
    """conv–BN–ReLU–[Dropout]–conv–BN, added to the input before the last ReLU."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _downsample(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.dropout(F.relu(self.bn1(self.conv1(x))))
        out = self.bn2(self.conv2(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1 × 1, 3 × 3 (with the stride), 1 × 1; Dropout after the second ReLU."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(dropout)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = _downsample(channels, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.dropout(F.relu(self.bn2(self.conv2(out))))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


def _downsample(channels: int, width: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and channels == width:
        return None
    return nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))


class ResNet(nn.Module):
    """Four stages behind a 7 × 7 stem with pooling, or a 3 × 3 one."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        repeats: tuple[int, ...],
        input_shape: Shape,
        num_classes: int,
        *,
        large: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.conv1 = stem_convolution(input_shape[0], large=large)
        self.bn1 = nn.BatchNorm2d(64)
        self.large = large
        channels, stages = 64, []
        for stage, (width, repeat) in enumerate(zip((64, 128, 256, 512), repeats, strict=True)):
            blocks = []
            for number in range(repeat):
                blocks.append(block(channels, width, 2 if stage and not number else 1, dropout))
                channels = width * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        if self.large:
            x = F.max_pool2d(x, 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class _ResNet(Model):
    """A depth of the residual network."""

    stem: Stem = "auto"
    """``3x3`` for small images, ``7x7`` with pooling for large ones; ``auto`` decides at 64 pixels."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout inside every block (the original leaves out the first block of each stage)."""
    block: ClassVar[type[BasicBlock] | type[Bottleneck]] = Bottleneck
    repeats: ClassVar[tuple[int, ...]]

    def network(self, input_shape: Shape, num_classes: int) -> nn.Module:
        large = large_stem(self.stem, input_shape, 64)
        return ResNet(self.block, self.repeats, input_shape, num_classes, large=large, dropout=self.dropout)


class ResNet18(_ResNet, name="resnet18"):
    """ResNet-18 (He et al., 2016a)."""

    block, repeats = BasicBlock, (2, 2, 2, 2)


class ResNet50(_ResNet, name="resnet50"):
    """ResNet-50, with the stride on the 3 × 3 convolution (He et al., 2016a)."""

    repeats = (3, 4, 6, 3)


class ResNet101(_ResNet, name="resnet101"):
    """ResNet-101."""

    repeats = (3, 4, 23, 3)


class ResNet152(_ResNet, name="resnet152"):
    """ResNet-152."""

    repeats = (3, 8, 36, 3)
