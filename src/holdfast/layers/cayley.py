"""Orthogonal layers by the Cayley transform, for each frequency of a circular convolution or for one matrix."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.layers.lipschitz import AffineLinear, LipschitzConv2d, LipschitzLinear
from holdfast.layers.operator_norm import ROUNDING, matrix_norm


def cayley(matrices: Tensor) -> Tensor:
    """Orthonormal columns, (..., m, n) with m ≥ n, or rows, m < n, from free matrices, real or complex.

    [U; V] ↦ [(1 + A)⁻¹ (1 − A); −2 V (1 + A)⁻¹] with A = U − Uᴴ + VᴴV (Trockman & Kolter, 2021).
    """
    if matrices.shape[-2] < matrices.shape[-1]:
        return cayley(matrices.mT).mT
    columns = matrices.shape[-1]
    u, v = matrices[..., :columns, :], matrices[..., columns:, :]
    a = u - u.mH + v.mH @ v
    one = torch.eye(columns, dtype=a.dtype, device=a.device)
    inverse = torch.linalg.inv(one + a)
    return torch.cat([inverse @ (one - a), -2 * v @ inverse], -2)


def transfer(weight: Tensor, size: tuple[int, int]) -> Tensor:
    """What a circular "same" convolution multiplies each frequency of images of this size with.

    (out, in, k_1, k_2) → (H, W // 2 + 1, out, in) complex.
    """
    high, wide = weight.shape[2:]
    kernel = F.pad(weight, (0, max(0, size[1] - wide), 0, max(0, size[0] - high)))
    if kernel.shape[2:] != size:
        raise ValueError(f"images of {size} are smaller than the {high} × {wide} kernel")
    kernel = kernel.roll((-(high // 2), -(wide // 2)), (2, 3))
    return torch.fft.rfft2(kernel).conj().permute(2, 3, 0, 1)


def filtered(x: Tensor, factors: Tensor) -> Tensor:
    """Each frequency of the images times its matrix, (N, in, H, W) → (N, out, H, W)."""
    spectrum = torch.fft.rfft2(x).permute(2, 3, 1, 0)  # (H, W', in, N)
    return torch.fft.irfft2((factors @ spectrum).permute(3, 2, 0, 1), s=x.shape[2:])


class SpectralConv2d(LipschitzConv2d):
    """A convolution that is given by a matrix for each frequency of its input's size."""

    padding_modes = ("circular",)
    margin = 0
    """Zeros around the image, in halves of the kernel."""

    def __init__(self, *args: int, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._size = (8, 8)

    def initial_weight(self) -> Tensor:
        return nn.init.xavier_normal_(torch.empty(self.out_channels, self.read_channels, *self.kernel_size))

    @abstractmethod
    def factors(self, response: Tensor) -> Tensor:
        """From the weight's response (H, W', out, in) to a norm of at most 1."""

    def derive(self, size: object = None) -> Tensor:
        return self.factors(transfer(self.weight, cast(tuple[int, int], size)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.unshuffled(x)
        high, wide = (side // 2 * self.margin for side in self.kernel_size)
        padded = F.pad(x, (wide, wide, high, high)) if self.margin else x
        self._size = cast(tuple[int, int], tuple(padded.shape[2:]))
        y = filtered(padded, self.derived(self._size))
        y = y[:, :, high : high + x.shape[2], wide : wide + x.shape[3]]
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)

    def lipschitz_bound(self) -> float:
        """The largest norm over the frequencies of the image size seen last (8 × 8 before)."""
        return float(matrix_norm(self.derived(self._size).detach()).amax())


class CayleyConv2d(SpectralConv2d):
    """Orthogonal circular convolution: a Cayley transform at each frequency (Trockman & Kolter, 2021).

    The kernel is first scaled to norm ``alpha``, which starts as its own and is trained, for every image size
    alike. A stride first turns pixels into channels. (N, in, H, W) → (N, out, H / stride, W / stride).
    """

    def __init__(self, *args: int, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.alpha = nn.Parameter(self.weight.detach().norm())

    def factors(self, response: Tensor) -> Tensor:
        return cayley(response * (self.alpha / self.weight.norm().clamp(min=1e-12)))


class SandwichConv2d(SpectralConv2d):
    """Circular √2 Aᵀ Ψ relu(√2 Ψ⁻¹ B x + b), with [A, B] the Cayley transform at each frequency of a kernel
    (out, out + in, k_1, k_2), and Ψ = diag(exp ``psi``) (Wang & Manchester, 2023).

    A stride first turns pixels into channels. (N, in, H, W) → (N, out, H / stride, W / stride).
    """

    def __init__(self, *args: int, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.alpha = nn.Parameter(self.weight.detach().norm())
        self.psi = nn.Parameter(torch.zeros(self.out_channels))

    def initial_weight(self) -> Tensor:
        channels = self.out_channels + self.read_channels
        return nn.init.xavier_normal_(torch.empty(self.out_channels, channels, *self.kernel_size))

    def factors(self, response: Tensor) -> Tensor:
        return cayley(response * (self.alpha / self.weight.norm().clamp(min=1e-12)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.unshuffled(x)
        self._size = cast(tuple[int, int], tuple(x.shape[2:]))
        both = self.derived(self._size)
        scale = self.psi.exp()
        hidden = filtered(x, math.sqrt(2) * both[..., self.out_channels :] / scale[:, None])
        hidden = F.relu(hidden if self.bias is None else hidden + self.bias.view(-1, 1, 1))
        return filtered(hidden, math.sqrt(2) * both[..., : self.out_channels].mH * scale)

    def lipschitz_bound(self) -> float:
        """‖[A, B]‖², as for ``SandwichLinear``, over the frequencies of the image size seen last."""
        return super().lipschitz_bound() ** 2 * (1 + 4 * torch.finfo(self.weight.dtype).eps)


class CayleyLinear(AffineLinear):
    """Dense layer with the Cayley transform of α W / ‖W‖ (Trockman & Kolter, 2021), α trained.

    (N, in) → (N, out).
    """

    def __init__(self, *args: int, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.alpha = nn.Parameter(self.weight.detach().norm())

    def initial_weight(self) -> Tensor:
        return nn.init.xavier_normal_(torch.empty(self.out_features, self.in_features))

    def derive(self, size: object = None) -> Tensor:
        return cayley(self.weight * (self.alpha / self.weight.norm().clamp(min=1e-12)))

    def lipschitz_bound(self) -> float:
        return float(matrix_norm(self.effective_weight().detach()))


class SandwichLinear(LipschitzLinear):
    """√2 Aᵀ Ψ relu(√2 Ψ⁻¹ B x + b) with [A, B] = the Cayley transform of a weight (out, out + in), so that
    A Aᵀ + B Bᵀ = 1, and Ψ = diag(exp ``psi``) (Wang & Manchester, 2023). (N, in) → (N, out)."""

    def __init__(self, *args: int, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.alpha = nn.Parameter(self.weight.detach().norm())
        self.psi = nn.Parameter(torch.zeros(self.out_features))

    def initial_weight(self) -> Tensor:
        return nn.init.xavier_normal_(torch.empty(self.out_features, self.out_features + self.in_features))

    def derive(self, size: object = None) -> tuple[Tensor, Tensor]:
        both = cayley(self.weight * (self.alpha / self.weight.norm().clamp(min=1e-12)))
        return (
            math.sqrt(2) * both[:, : self.out_features].T * self.psi.exp(),
            math.sqrt(2) * self.psi.neg().exp()[:, None] * both[:, self.out_features :],
        )

    def forward(self, x: Tensor) -> Tensor:
        outer, inner = self.derived()
        return F.linear(F.relu(F.linear(x, inner, self.bias)), outer)

    def lipschitz_bound(self) -> float:
        """‖[A, B]‖²: the diagonal matrices commute, and ‖2 Aᵀ D B‖ ≤ 1 for 0 ≤ D ≤ 1 where A Aᵀ + B Bᵀ ≤ 1."""
        outer, inner = (part.detach().double() for part in self.derived())
        scale = self.psi.detach().double().exp()
        a, b = (outer / scale).T / math.sqrt(2), scale[:, None] * inner / math.sqrt(2)
        # What rounding of Ψ does to the two factors is relative to their entries.
        return float(matrix_norm(torch.cat([a, b], 1)) ** 2) * (
            1 + 4 * torch.finfo(self.weight.dtype).eps + ROUNDING
        )
