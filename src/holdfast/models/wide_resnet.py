"""Wide residual networks of any depth and width."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, field_validator
from torch import Tensor, nn

from holdfast.models.model import Model, Shape

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}


class WideBlock(nn.Module):
    """BN–ReLU–conv–BN–ReLU–[Dropout]–conv; where the width changes a 1 × 1 convolution of the activated input."""

    def __init__(self, channels: int, width: int, stride: int, dropout: float, activation: type[nn.Module]) -> None:
        super().__init__()
        self.bn1, self.relu1 = nn.BatchNorm2d(channels), activation()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(width), activation()
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        changes = channels != width or stride != 1
        self.shortcut = nn.Conv2d(channels, width, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(x))
        residual = self.conv2(self.dropout(self.relu2(self.bn2(self.conv1(activated)))))
        return residual + (x if self.shortcut is None else self.shortcut(activated))


class WideGroup(nn.Module):
    """Blocks of one width."""

    def __init__(self, blocks: list[WideBlock]) -> None:
        super().__init__()
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNetNet(nn.Module):
    """A 3 × 3 stem of 16 channels, three groups of pre-activation blocks, pooling, one linear classifier."""

    def __init__(
        self, depth: int, width: int, dropout: float, activation: str, input_shape: Shape, num_classes: int
    ) -> None:
        super().__init__()
        kind = ACTIVATIONS[activation]
        self.conv1 = nn.Conv2d(input_shape[0], 16, 3, 1, 1, bias=False)
        channels, groups = 16, []
        for group, base in enumerate((16, 32, 64), start=1):
            blocks = []
            for number in range((depth - 4) // 6):
                stride = 2 if group > 1 and not number else 1
                blocks.append(WideBlock(channels, base * width, stride, dropout, kind))
                channels = base * width
            groups.append(WideGroup(blocks))
        self.block1, self.block2, self.block3 = groups
        self.bn1, self.relu = nn.BatchNorm2d(channels), kind()
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels)))
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = F.adaptive_avg_pool2d(self.relu(self.bn1(x)), 1)
        return self.fc(torch.flatten(x, 1))


class WideResNet(Model, name="wide-resnet"):
    """Wide residual network (Zagoruyko & Komodakis, 2016) of any depth 6 n + 4 and width.

    The local-Lipschitz line's WRN-40-10 has the same keys, but for a group of 2.6 million weights that its
    forward never reads and that is left out here.
    """

    depth: PositiveInt = 28
    """Number of convolutions, 6 n + 4."""
    width: PositiveInt = 10
    """Channels of the groups: 16, 32 and 64 times this."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the second convolution of each block."""
    activation: Literal["relu", "silu"] = "relu"
    """ReLU, or SiLU as in later adversarial training."""

    @field_validator("depth")
    @classmethod
    def _whole_blocks(cls, depth: int) -> int:
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"the depth must be 6 n + 4 with n ≥ 1 (10, 16, 22, 28, …), given {depth}")
        return depth

    def network(self, input_shape: Shape, num_classes: int) -> nn.Module:
        return WideResNetNet(self.depth, self.width, self.dropout, self.activation, input_shape, num_classes)


class WRN28x10(WideResNet, name="wrn-28-10"):
    """Wide ResNet of depth 28 and width 10."""

    depth: PositiveInt = 28
    width: PositiveInt = 10


class WRN34x10(WideResNet, name="wrn-34-10"):
    """Wide ResNet of depth 34 and width 10."""

    depth: PositiveInt = 34
    width: PositiveInt = 10


class WRN40x10(WideResNet, name="wrn-40-10"):
    """Wide ResNet of depth 40 and width 10."""

    depth: PositiveInt = 40
    width: PositiveInt = 10


class WRN70x16(WideResNet, name="wrn-70-16"):
    """Wide ResNet of depth 70 and width 16."""

    depth: PositiveInt = 70
    width: PositiveInt = 16
