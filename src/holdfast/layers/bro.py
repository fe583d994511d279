"""Block reflectors: orthogonal for every free parameter, without an iteration."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from holdfast.layers.cayley import SpectralConv2d
from holdfast.layers.lipschitz import AffineLinear
from holdfast.layers.operator_norm import matrix_norm


def block_reflector(v: Tensor) -> Tensor:
    """W = 1 − 2 V (Vᴴ V)⁻¹ Vᴴ, which mirrors at the complement of the columns of V (Lai et al., 2025).

    Orthogonal, symmetric and its own inverse, for every V of full rank; with V ↦ V A it does not change.

    Args:
        v: (..., m, r) with r ≤ m, real or complex.

    Returns:
        (..., m, m).
    """
    q = torch.linalg.qr(v).Q  # V (Vᴴ V)⁻¹ Vᴴ = Q Qᴴ, without squaring the condition of V
    one = torch.eye(v.shape[-2], dtype=v.dtype, device=v.device)
    return one - 2 * q @ q.mH


def half(width: int) -> int:
    """The rank of V: as many directions are mirrored as are kept."""
    return max(1, width // 2)


class BROConv2d(SpectralConv2d):
    """Orthogonal circular convolution: a block reflector at each frequency (Lai et al., 2025).

    The free kernel is (width, width / 2, k_1, k_2) with width = max(in, out); between different numbers of channels
    the layer is cut out of the square one. A stride first turns pixels into channels.
    (N, in, H, W) → (N, out, H / stride, W / stride).
    """

    def initial_weight(self) -> Tensor:
        return nn.init.xavier_normal_(torch.empty(self.width, half(self.width), *self.kernel_size))

    def factors(self, response: Tensor) -> Tensor:
        return block_reflector(response)[..., : self.out_channels, : self.read_channels]


class BROLinear(AffineLinear):
    """Dense layer that is a block reflector, or cut out of one (Lai et al., 2025). (N, in) → (N, out)."""

    def initial_weight(self) -> Tensor:
        return nn.init.xavier_normal_(torch.empty(self.width, half(self.width)))

    def derive(self, size: object = None) -> Tensor:
        return block_reflector(self.weight)[: self.out_features, : self.in_features]

    def lipschitz_bound(self) -> float:
        return float(matrix_norm(self.effective_weight().detach()))
