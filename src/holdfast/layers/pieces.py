"""A network that takes batches of one size, as one that takes any."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class InPieces(nn.Module):
    """Asks a network that takes ``size`` examples at a time, no more and no fewer: (N, ...) → (N, ...) for any N.

    The last piece is filled up with its last example. Bounds see the network, traced at that size.
    """

    def __init__(self, network: nn.Module, size: int = 1) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"expected a batch of at least 1, given {size}")
        self.network, self.size = network, size

    def forward(self, x: Tensor) -> Tensor:
        missing = -len(x) % self.size if len(x) else self.size
        filling = x[-1:] if len(x) else x.new_zeros(1, *x.shape[1:])
        whole = torch.cat([x, filling.expand(missing, *x.shape[1:])]) if missing else x
        return torch.cat([self.network(piece) for piece in whole.split(self.size)])[: len(x)]

    def extra_repr(self) -> str:
        return f"size={self.size}"
