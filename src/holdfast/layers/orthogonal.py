"""Orthogonalised weights: Björck's iteration, and block convolutions made of projections."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from holdfast.layers.lipschitz import AffineConv2d, AffineLinear
from holdfast.layers.operator_norm import convolution_norm, matrix_norm

TOLERANCE = 1e-4
"""In training steps: how far wᵀw may be from the identity."""


def bjorck(matrices: Tensor, iterations: int, tolerance: float = 0.0) -> Tensor:
    """Steps w ← 1.5 w − 0.5 w wᵀ w towards the nearest matrix with orthonormal rows or columns.

    Björck & Bowie, 1971. It converges where all singular values lie in (0, √3). (..., m, n) → (..., m, n).

    Args:
        iterations: at most so many.
        tolerance: stop where no entry of wᵀw is farther from the identity.
    """
    tall = matrices.shape[-2] >= matrices.shape[-1]
    w = matrices if tall else matrices.mT
    for _ in range(iterations):
        gram = w.mT @ w
        if tolerance and (gram.detach() - torch.eye(w.shape[-1]).to(w)).abs().amax() <= tolerance:
            break
        w = 1.5 * w - 0.5 * w @ gram
    return w if tall else w.mT


def scaled(matrices: Tensor, steps: int = 10) -> Tensor:
    """Each matrix by its spectral norm, estimated by a few steps of power iteration from a fixed start."""
    matrices = matrices / matrices.detach().abs().amax((-2, -1), keepdim=True).clamp(min=1e-30)
    with torch.no_grad():
        v = torch.arange(1, matrices.shape[-1] + 1).cos()[:, None].to(matrices)
        for _ in range(steps):
            v = nn.functional.normalize(matrices.mT @ (matrices @ v), dim=-2)
        u = nn.functional.normalize(matrices @ v, dim=-2)
    return matrices / ((u.mT @ matrices @ v) + 1e-12)


def _orthogonalised(weight: Tensor, training: bool) -> Tensor:
    """Near enough for a training step, and as near as the floating-point type allows for the rest."""
    return bjorck(scaled(weight), 20, TOLERANCE) if training else bjorck(scaled(weight), 50)


class BjorckLinear(AffineLinear):
    """Dense layer with Björck-orthogonalised weight (Anil et al., 2019). (N, in) → (N, out)."""

    def initial_weight(self) -> Tensor:
        return nn.init.orthogonal_(torch.empty(self.out_features, self.in_features))

    def derive(self, size: object = None) -> Tensor:
        return _orthogonalised(self.weight, self.training)

    def lipschitz_bound(self) -> float:
        return float(matrix_norm(self.effective_weight().detach()))


def block_kernel(orthogonal: Tensor, out_channels: int, in_channels: int, kernel_size: int) -> Tensor:
    """An orthogonal convolution's kernel (out, in, k, k) out of 2 (k − 1) + 1 orthogonal matrices (n, n).

    The columns of each but the first give a projection P (the first half of them); two projections make the
    2 × 2 kernel [[P Q, P (1 − Q)], [(1 − P) Q, (1 − P)(1 − Q)]], k − 1 of these are convolved with one
    another, and the first matrix changes the number of channels (Li et al., 2019; Xiao et al., 2018).
    """
    n = orthogonal.shape[1]
    half = orthogonal[1:, :, : n // 2]
    projections = half @ half.mT
    one = torch.eye(n).to(orthogonal)
    kernel = one[None, None]  # (taps, taps, n, n)
    for p, q in projections.view(-1, 2, n, n):
        block = torch.stack([torch.stack([p @ q, p - p @ q]), torch.stack([q - p @ q, one - p - q + p @ q])])
        taps = kernel.shape[0]
        longer = kernel.new_zeros(taps + 1, taps + 1, n, n)
        for a in (0, 1):
            for b in (0, 1):
                longer = longer + nn.functional.pad(kernel @ block[a, b], (0, 0, 0, 0, b, 1 - b, a, 1 - a))
        kernel = longer
    if in_channels <= out_channels:
        kernel = kernel @ orthogonal[0][:, :in_channels]
    else:
        kernel = orthogonal[0][:out_channels] @ kernel
    return kernel.permute(2, 3, 0, 1)


class BCOPConv2d(AffineConv2d):
    """Block convolution orthogonal parametrisation (Li et al., 2019); orthogonal with circular padding.

    The 2 (k − 1) + 1 free matrices (n, n), n = max(in, out), are stacked in ``weight``. A stride first turns
    pixels into channels. (N, in, H, W) → (N, out, H / stride, W / stride).
    """

    padding_modes = ("circular", "zeros")

    def initial_weight(self) -> Tensor:
        if self.kernel_size[0] != self.kernel_size[1]:
            raise ValueError(f"BCOPConv2d needs a square kernel, given {self.kernel_size}")
        weight = torch.empty(2 * self.kernel_size[0] - 1, self.width, self.width)
        for matrix in weight:
            nn.init.orthogonal_(matrix)
        return weight

    def derive(self, size: object = None) -> Tensor:
        orthogonal = _orthogonalised(self.weight, self.training)
        return block_kernel(orthogonal, self.out_channels, self.read_channels, self.kernel_size[0])

    def lipschitz_bound(self) -> float:
        return float(convolution_norm(self.effective_weight().detach(), (1, 1), (1, 1), 1))
