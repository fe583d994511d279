"""MaxMin."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MaxMin(nn.Module):
    """Sorts each pair of channels (2k, 2k + 1) to (max, min): 1-Lipschitz, and gradient norm preserving
    (Anil et al., 2019; GroupSort of size 2).

    Raises:
        ValueError: an odd number of channels, dimension 1 of (N, C, ...).
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] % 2:
            raise ValueError(f"MaxMin needs an even number of channels, given {x.shape[1]}")
        first, second = x[:, ::2], x[:, 1::2]
        return torch.stack([torch.maximum(first, second), torch.minimum(first, second)], 2).flatten(1, 2)
