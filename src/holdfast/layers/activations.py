"""Activations that keep lengths: 1-Lipschitz in l_2, with a Jacobian that is orthogonal almost everywhere."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class MaxMin(nn.Module):
    """Sorts each pair of channels (2k, 2k + 1) to (max, min): 1-Lipschitz, and gradient norm preserving
    (Anil et al., 2019; GroupSort of size 2). A last channel without a partner stays as it is.

    Channels are dimension 1 of (N, C, ...).
    """

    def forward(self, x: Tensor) -> Tensor:
        pairs = x.shape[1] // 2 * 2
        first, second = x[:, 0:pairs:2], x[:, 1:pairs:2]
        result = torch.stack([torch.maximum(first, second), torch.minimum(first, second)], 2).flatten(1, 2)
        return result if pairs == x.shape[1] else torch.cat([result, x[:, pairs:]], 1)


class GroupSort(nn.Module):
    """Sorts each group of ``size`` neighbouring channels in descending order (Anil et al., 2019).

    Raises:
        ValueError: the channels, dimension 1 of (N, C, ...), are not a multiple of ``size``.
    """

    def __init__(self, size: int = 2) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] % self.size:
            raise ValueError(f"GroupSort needs a multiple of {self.size} channels, given {x.shape[1]}")
        return x.unflatten(1, (-1, self.size)).sort(2, descending=True).values.flatten(1, 2)

    def extra_repr(self) -> str:
        return str(self.size)


class Householder(nn.Module):
    """Mirrors each pair of channels (2k, 2k + 1) at a learned line where it lies on one side (Singla et al., 2022).

    With v = (sin θ/2, −cos θ/2): z for ⟨v, z⟩ > 0, else z − 2 v ⟨v, z⟩; θ = π/2 is MaxMin.

    Raises:
        ValueError: an odd number of channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels % 2:
            raise ValueError(f"Householder needs an even number of channels, given {channels}")
        self.theta = nn.Parameter(torch.full((channels // 2,), math.pi / 2))

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.dim() - 2))
        across, along = (self.theta / 2).sin().view(shape), -(self.theta / 2).cos().view(shape)
        first, second = x[:, ::2], x[:, 1::2]
        beyond = (across * first + along * second).clamp(max=0)
        return torch.stack([first - 2 * beyond * across, second - 2 * beyond * along], 2).flatten(1, 2)


class Abs(nn.Module):
    """|x| of each entry."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


class NActivation(nn.Module):
    """x − 2 θ_1 below θ_1, −x up to θ_2, x − 2 θ_2 above: the N-activation (Prach & Lampert, 2024).

    Two thresholds for each channel, taken in order; slopes are 1 and −1, so it is 1-Lipschitz.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([-0.5, 0.5]).repeat(channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.theta.aminmax(dim=1)
        shape = (-1, *[1] * (x.dim() - 2))
        low, high = low.view(shape), high.view(shape)
        return torch.where(x < low, x - 2 * low, torch.where(x < high, -x, x - 2 * high))
