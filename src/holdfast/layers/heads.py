"""Layers whose constant is not 1 but known: the residual of a linear map, and a head with rows of length 1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.layers.lipschitz import AffineConv2d, AffineLinear
from holdfast.layers.operator_norm import convolution_norm, matrix_norm


class LinearResidualConv2d(AffineConv2d):
    """x + W x as one convolution, its constant left to the training (Hu et al., 2023).

    (N, C, H, W) → (N, C, H, W).
    """

    strides = False

    def initial_weight(self) -> Tensor:
        if self.in_channels != self.out_channels:
            raise ValueError(f"x + W x needs equal channels, given {self.in_channels} and {self.out_channels}")
        return nn.init.xavier_normal_(torch.empty(self.out_channels, self.in_channels, *self.kernel_size), gain=0.3)

    def derive(self, size: object = None) -> Tensor:
        return self.weight + nn.init.dirac_(torch.empty_like(self.weight))

    def lipschitz_bound(self) -> float:
        return float(convolution_norm(self.effective_weight().detach(), (1, 1), (1, 1), 1))


class NormalizedLinear(AffineLinear):
    """Last-layer normalisation: W_k / ‖W_k‖ (Singla et al., 2022). (N, in) → (N, out).

    Each logit is 1-Lipschitz, their difference ‖w_y − w_j‖ ≤ 2: certificates go by pairs of classes.
    """

    def initial_weight(self) -> Tensor:
        return nn.init.orthogonal_(torch.empty(self.out_features, self.in_features))

    def derive(self, size: object = None) -> Tensor:
        return F.normalize(self.weight, dim=1)

    def lipschitz_bound(self) -> float:
        return float(matrix_norm(self.effective_weight().detach()))
