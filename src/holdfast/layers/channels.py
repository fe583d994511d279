"""What 1-Lipschitz networks do beside weights and activations; all of it is 1-Lipschitz in l_2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.layers.lipschitz import widen


class ZeroChannelConcatenation(nn.Module):
    """Appends channels of zeros up to ``channels``, dimension 1 of (N, C, ...); what has as many stays as it is."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return widen(x, self.channels)

    def extra_repr(self) -> str:
        return str(self.channels)


class FirstChannels(nn.Module):
    """Keeps the first ``channels`` of dimension 1 of (N, C, ...)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : self.channels]

    def extra_repr(self) -> str:
        return str(self.channels)


class BatchCentering(nn.Module):
    """Subtracts the batch's mean of each channel, in eval mode its running mean: BatchNorm without the scaling.

    (N, C, ...) → (N, C, ...).
    """

    running_mean: Tensor

    def __init__(self, channels: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean = self.running_mean
        if self.training:
            mean = x.mean([0, *range(2, x.dim())])
            self.running_mean.lerp_(mean.detach(), self.momentum)
        return x - mean.view(-1, *[1] * (x.dim() - 2))

    def extra_repr(self) -> str:
        return f"{len(self.running_mean)}, momentum={self.momentum}"


class L2NormPool2d(nn.Module):
    """The l_2 norm of each window of ``kernel_size`` × ``kernel_size`` pixels, which do not overlap.

    ``kernel_size=None`` takes one window, the whole image. (N, C, H, W) → (N, C, H / k, W / k).
    """

    def __init__(self, kernel_size: int | None = None) -> None:
        super().__init__()
        self.kernel_size = kernel_size

    def forward(self, x: Tensor) -> Tensor:
        window = (self.kernel_size, self.kernel_size) if self.kernel_size else tuple(x.shape[2:])
        parts = F.unfold(x.flatten(0, 1)[:, None], window, stride=window)
        norms = torch.linalg.vector_norm(parts, dim=1)
        return norms.view(*x.shape[:2], x.shape[2] // window[0], x.shape[3] // window[1])

    def extra_repr(self) -> str:
        return str(self.kernel_size)
