"""Layer-wise orthogonal training: the polar factor at each frequency, by Newton's iteration."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from holdfast.layers.cayley import SpectralConv2d


def inverse_root(matrices: Tensor, iterations: int) -> Tensor:
    """M^(−½) of Hermitian positive matrices by the coupled Newton–Schulz iteration (Higham, 2008, 6.35).

    It comes from below: the singular values of M^(−½) W grow towards 1.
    """
    norm = torch.linalg.matrix_norm(matrices, keepdim=True)
    one = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    y, z = matrices / norm, one.expand_as(matrices)
    for _ in range(iterations):
        step = 0.5 * (3 * one - z @ y)
        y, z = y @ step, step @ z
    return z / norm.sqrt()


class LOTConv2d(SpectralConv2d):
    """(Ŵ Ŵᴴ + 1e-4)^(−½) Ŵ at each frequency of the zero-padded image, cut to its size again (Xu et al., 2022).

    10 Newton steps; they near orthogonality slowly where the spectrum is wide, and from below. Square layers start
    as the identity. A stride first turns pixels into channels. (N, in, H, W) → (N, out, H / stride, W / stride).
    """

    padding_modes = ("zeros",)
    margin = 1

    def initial_weight(self) -> Tensor:
        if self.out_channels == self.read_channels:
            return nn.init.dirac_(torch.empty(self.out_channels, self.read_channels, *self.kernel_size))
        return super().initial_weight()

    def factors(self, response: Tensor) -> Tensor:
        wide = response.shape[-2] <= response.shape[-1]
        gram = response @ response.mH if wide else response.mH @ response
        one = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        root = inverse_root(gram + 1e-4 * one, iterations=10)
        return root @ response if wide else response @ root
