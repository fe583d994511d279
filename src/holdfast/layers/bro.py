"""Block reflectors: orthogonal for every free parameter, without an iteration."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from holdfast.layers.cayley import SpectralConv2d
from holdfast.layers.lipschitz import AffineLinear
from holdfast.layers.operator_norm import matrix_norm


def block_reflector(v: Tensor, rows: int, columns: int) -> Tensor:
    """The first rows and columns of W = 1 − 2 V (Vᴴ V)⁻¹ Vᴴ, which turns the span of V's columns round.

    W is orthogonal, symmetric and its own inverse for every V of full rank (Lai et al., 2025).

    Args:
        v: (..., m, r) with r ≤ m, real or complex.
        rows: at most m, as ``columns``.

    Returns:
        (..., rows, columns).
    """
    q = torch.linalg.qr(v).Q  # V (Vᴴ V)⁻¹ Vᴴ = Q Qᴴ, without squaring the condition of V
    one = torch.eye(rows, columns, dtype=v.dtype, device=v.device)
    return one - 2 * q[..., :rows, :] @ q[..., :columns, :].mH


def _rank(first: int, second: int) -> int:
    """Of V: in a square layer as many directions are mirrored as are kept."""
    return max(1, min(first, second) // 2)


class BROConv2d(SpectralConv2d):
    """Orthogonal circular convolution: a block reflector at each frequency (Lai et al., 2025).

    The free kernel is (max(in, out), min(in, out) / 2, k_1, k_2); between different numbers of channels the layer
    is cut out of the square one. A stride first turns pixels into channels.
    (N, in, H, W) → (N, out, H / stride, W / stride).
    """

    def initial_weight(self) -> Tensor:
        return nn.init.xavier_normal_(
            torch.empty(self.width, _rank(self.read_channels, self.out_channels), *self.kernel_size)
        )

    def factors(self, response: Tensor) -> Tensor:
        return block_reflector(response, self.out_channels, self.read_channels)


class BROLinear(AffineLinear):
    """Dense layer that is a block reflector, or cut out of one (Lai et al., 2025). (N, in) → (N, out)."""

    def initial_weight(self) -> Tensor:
        return nn.init.xavier_normal_(torch.empty(self.width, _rank(self.in_features, self.out_features)))

    def derive(self, size: object = None) -> Tensor:
        return block_reflector(self.weight, self.out_features, self.in_features)

    def lipschitz_bound(self) -> float:
        return float(matrix_norm(self.effective_weight().detach()))
