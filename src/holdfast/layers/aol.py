"""Almost-orthogonal layers: columns rescaled so that the Gram matrix is dominated by its diagonal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from holdfast.layers.lipschitz import AffineConv2d, AffineLinear

EPSILON = 1e-6
"""Added to the row sums, under the root."""


def gram_row_sums(weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """t_i = Σ_j Σ_s |C_ij(s)| q_j / q_i of the input channels i, (in,).

    C(s) are the correlations of a kernel's input channels at all shifts s; for a matrix C = WᵀW. By Gershgorin's
    theorem the squared operator norm is at most max_i t_i, whichever the image and the padding.

    Args:
        weight: (out, in) or (out, in, k_1, k_2).
        scale: q, (in,), positive.
    """
    kernel = weight.view(*weight.shape, 1, 1) if weight.dim() == 2 else weight
    high, wide = kernel.shape[2:]
    q = torch.ones_like(kernel[0, :, 0, 0]) if scale is None else scale
    sums = torch.zeros_like(q)
    for down in range(high):
        for right in range(-wide + 1 if down else 0, wide):
            first = kernel[:, :, down:, max(right, 0) : wide + min(right, 0)]
            second = kernel[:, :, : high - down, max(-right, 0) : wide - max(right, 0)]
            size = first.transpose(0, 1).flatten(1), second.transpose(0, 1).flatten(1)
            correlation = (size[0] @ size[1].T).abs()
            sums = sums + correlation @ q
            if down or right:  # the opposite shift has the transposed matrix
                sums = sums + q @ correlation
    return sums / q


def aol_rescaled(weight: Tensor) -> Tensor:
    """W_i / √(t_i + 1e-6) for every input channel i (Prach & Lampert, 2022, theorems 1 and 2)."""
    factor = (gram_row_sums(weight) + EPSILON).rsqrt()
    return weight * factor.view(1, -1, *[1] * (weight.dim() - 2))


@torch.no_grad()
def aol_bound(weight: Tensor, effective: Tensor) -> float:
    """At least the operator norm of an effective weight.

    Gershgorin's bound of its Gram matrix with channels scaled by √t: but for rounding √(t / (t + 1e-6)) < 1.
    """
    scale = (gram_row_sums(weight.double()) + EPSILON).sqrt()
    return float(gram_row_sums(effective.double(), scale).amax().sqrt()) * (1 + 1e-12)


class AOLConv2d(AffineConv2d):
    """Almost-orthogonal convolution (Prach & Lampert, 2022): ``aol_rescaled`` kernel, starting as the identity.

    (N, in, H, W) → (N, out, H / stride, W / stride).
    """

    unshuffles = False

    def initial_weight(self) -> Tensor:
        weight = torch.empty(self.out_channels, self.in_channels, *self.kernel_size)
        return nn.init.dirac_(weight)

    def derive(self, size: object = None) -> Tensor:
        return aol_rescaled(self.weight)

    def lipschitz_bound(self) -> float:
        return aol_bound(self.weight, self.effective_weight())


class AOLLinear(AffineLinear):
    """Almost-orthogonal dense layer (Prach & Lampert, 2022), starting as the identity. (N, in) → (N, out)."""

    def initial_weight(self) -> Tensor:
        return nn.init.eye_(torch.empty(self.out_features, self.in_features))

    def derive(self, size: object = None) -> Tensor:
        return aol_rescaled(self.weight)

    def lipschitz_bound(self) -> float:
        return aol_bound(self.weight, self.effective_weight())
