"""Residual layers x − 2 Wᵀ T relu(W x + b) that descend a convex potential: 1-Lipschitz where ‖T^½ W‖ ≤ 1."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.layers.aol import gram_row_sums
from holdfast.layers.lipschitz import (
    LipschitzConv2d,
    LipschitzLayer,
    LipschitzLinear,
    adjoint_kernel,
    convolve,
    widen,
)
from holdfast.layers.operator_norm import convolution_norm, dense_norm, is_small, matrix_norm

Map = Callable[[Tensor], Tensor]
Size = tuple[int, ...]


def cpl_step(x: Tensor, forward: Map, adjoint: Map, bias: Tensor | None, rescaling: Tensor) -> Tensor:
    """x − Wᵀ T relu(W x + b), T a number or one per hidden channel; (N, C, ...)."""
    shape = (-1, *[1] * (x.dim() - 2))
    hidden = forward(x)
    hidden = hidden if bias is None else hidden + bias.view(shape)
    return x - adjoint(rescaling.view(shape) * F.relu(hidden))


def power_step(forward: Map, adjoint: Map, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step of power iteration from u: the next u, v, and σ = ⟨v, W u⟩, differentiable in W alone."""
    with torch.no_grad():
        v = forward(u)
        v = v / (v.norm() + 1e-12)
        u = adjoint(v)
        u = u / (u.norm() + 1e-12)
    return u, v, (v * forward(u)).sum()


class _Residual(LipschitzLayer):
    """What the residual layers share.

    Where the numbers of channels differ, the input is filled up with zeros, or the output cut off.
    """

    @abstractmethod
    def maps(self) -> tuple[Map, Map]:
        """W and Wᵀ."""

    @abstractmethod
    def channels(self) -> tuple[int, int]:
        """Inside, and of the output."""

    def size_of(self, x: Tensor) -> Size | None:
        """What of the input's size matters to T."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        inside, out = self.channels()
        x = widen(x, inside)
        result = cpl_step(x, *self.maps(), self.bias, self.derived(self.size_of(x)))
        return result[:, :out] if out < inside else result


class _ConvolutionalResidual(_Residual, LipschitzConv2d):
    strides = False

    @property
    def bias_size(self) -> int:
        return self.width

    def initial_weight(self) -> Tensor:
        return nn.init.kaiming_uniform_(torch.empty(self.width, self.width, *self.kernel_size), a=5**0.5)

    def channels(self) -> tuple[int, int]:
        return self.width, self.out_channels

    def maps(self) -> tuple[Map, Map]:
        back = adjoint_kernel(self.weight)
        return (
            lambda x: convolve(x, self.weight, None, self.padding_mode),
            lambda x: convolve(x, back, None, self.padding_mode),
        )


class _DenseResidual(_Residual, LipschitzLinear):
    @property
    def bias_size(self) -> int:
        return self.width

    def initial_weight(self) -> Tensor:
        return nn.init.kaiming_uniform_(torch.empty(self.width, self.width), a=5**0.5)

    def channels(self) -> tuple[int, int]:
        return self.width, self.out_features

    def maps(self) -> tuple[Map, Map]:
        return (lambda x: F.linear(x, self.weight)), (lambda x: F.linear(x, self.weight.T))


class _CPL(_Residual):
    """T = 2 / σ²."""

    def __init__(self, *args: int, **settings: bool | str | int) -> None:
        super().__init__(*args, **settings)
        # No buffer: its size is the input's, and what copies buffers between models would stumble over that.
        self.power_vector = torch.empty(0)

    def get_extra_state(self) -> Tensor:
        return self.power_vector

    def set_extra_state(self, state: Tensor) -> None:
        self.power_vector = state.clone()

    def size_of(self, x: Tensor) -> Size:
        return tuple(x.shape[2:])

    @abstractmethod
    def norm(self, size: Size) -> Tensor:
        """At least ‖W‖ for inputs of this size, float64."""

    def derive(self, size: object = None) -> Tensor:
        if not self.training:
            return (2 / (self.norm(cast(Size, size)) ** 2 + 1e-12)).to(self.weight)
        forward, adjoint = self.maps()
        u, _, sigma = power_step(forward, adjoint, self._start((1, self.channels()[0], *cast(Size, size))))
        self.power_vector = u
        return 2 / (sigma**2 + 1e-12)

    def _start(self, shape: Size) -> Tensor:
        """The vector of the last step; a fixed random one for inputs of another size."""
        if self.power_vector.shape == shape:
            return self.power_vector.to(self.weight)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.weight)

    def lipschitz_bound(self) -> float:
        """1 up to rounding: in eval mode σ is an upper bound of ‖W‖ itself (in training an estimate from below)."""
        return 1.0 + 4 * torch.finfo(self.weight.dtype).eps


class CPLConv2d(_CPL, _ConvolutionalResidual):
    """Convex potential layer x − 2 / σ² · Wᵀ relu(W x + b) with σ = ‖W‖ (Meunier et al., 2022).

    In training σ takes one step of power iteration per forward, from a saved vector; in eval mode it is a
    certified upper bound for the size of the input: exact for small ones. (N, in, H, W) → (N, out, H, W).
    """

    def norm(self, size: Size) -> Tensor:
        weight = self.weight.detach().double()
        zero = weight.new_zeros(1, self.width, *size)

        def forward(x: Tensor) -> Tensor:
            return convolve(x, weight, None, self.padding_mode)

        if is_small(forward, zero):
            return dense_norm(forward, zero)
        around = [side // 2 if self.padding_mode == "zeros" else 0 for side in self.kernel_size]
        torus = size[0] + around[0], size[1] + around[1]
        return convolution_norm(weight, (1, 1), (1, 1), 1, torus=torus)


class CPLLinear(_CPL, _DenseResidual):
    """Dense convex potential layer (Meunier et al., 2022); as ``CPLConv2d``. (N, in) → (N, out)."""

    def norm(self, size: Size) -> Tensor:
        return matrix_norm(self.weight.detach())


class _SLL(_Residual):
    """T_i = 2 / Σ_j |W Wᵀ|_ij q_j / q_i."""

    def __init__(self, *args: int, **settings: bool | str | int) -> None:
        super().__init__(*args, **settings)
        self.q = nn.Parameter(torch.randn(self.channels()[0]))

    def derive(self, size: object = None) -> Tensor:
        return 2 / (gram_row_sums(self.weight.transpose(0, 1), self.q.abs() + 1e-6) + 1e-6)

    @torch.no_grad()
    def lipschitz_bound(self) -> float:
        """max(1, 2 ρ − 1), where ρ ≥ ‖(T / 2)^½ W‖² is how far rounding takes T above its theory."""
        sums = gram_row_sums(self.weight.double().transpose(0, 1), self.q.double().abs() + 1e-6)
        rho = float((self.derived().double() / 2 * sums).amax())
        return max(1.0, 2 * rho - 1)


class SLLConv2d(_SLL, _ConvolutionalResidual):
    """SDP-based layer x − Wᵀ T relu(W x + b), T_i = 2 / (Σ_j C_ij q_j / q_i + 1e-6) with C the summed absolute
    correlations of output channels and q = |``q``| + 1e-6 (Araujo et al., 2023). (N, in, H, W) → (N, out, H, W).
    """


class SLLLinear(_SLL, _DenseResidual):
    """Dense SDP-based layer (Araujo et al., 2023); as ``SLLConv2d`` with C = |W Wᵀ|. (N, in) → (N, out)."""
