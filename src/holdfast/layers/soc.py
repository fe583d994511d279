"""Skew orthogonal convolutions: the exponential of a skew-symmetric convolution."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.layers.lipschitz import LipschitzConv2d, adjoint_kernel, convolve, widen
from holdfast.layers.operator_norm import matrix_norm

TRAINING_TERMS = 5
LEAST_TERMS = 12
"""Of the exponential in eval mode, beside the first."""


def skew(weight: Tensor) -> Tensor:
    """½ (K − Kᵀ), the kernel of a skew-symmetric convolution for either padding."""
    return (weight - adjoint_kernel(weight)) / 2


def matricisations(kernel: Tensor) -> list[Tensor]:
    """Four matrices of a kernel (o, i, h, w): (o h) × (i w), (o w) × (i h), o × (i h w), (o h w) × i.

    The convolution's norm is at most √(h w) times the smallest of theirs (Singla & Feizi, 2021, theorem 1).
    """
    out, channels, high, wide = kernel.shape
    return [
        kernel.permute(0, 2, 1, 3).reshape(out * high, channels * wide),
        kernel.permute(0, 3, 1, 2).reshape(out * wide, channels * high),
        kernel.reshape(out, -1),
        kernel.permute(0, 2, 3, 1).reshape(-1, channels),
    ]


def convolution_exponential(x: Tensor, kernel: Tensor, terms: int, padding_mode: str = "zeros") -> Tensor:
    """Σ_{m ≤ terms} L^m x / m! for the convolution L with this kernel; (N, C, H, W)."""
    total = power = x
    for m in range(1, terms + 1):
        power = convolve(power, kernel, None, padding_mode) / m
        total = total + power
    return total


class SOCConv2d(LipschitzConv2d):
    """exp(c S / σ) for the skew part S of the kernel, σ the smallest of four matrix norms, c = 0.7 (1 for 1 × 1)
    (Singla & Feizi, 2021): orthogonal between equal numbers of channels.

    The exponential's series ends after 5 terms in training. In eval mode it goes on until what is missing is
    below 3e-6 (12 terms for 3 × 3), and σ is not estimated by power iteration but computed. Fewer input
    channels are filled up with zeros, fewer output channels cut off; a stride first turns pixels into channels.
    (N, in, H, W) → (N, out, H / stride, W / stride).
    """

    power_vectors: Tensor
    started: Tensor

    def __init__(self, *args: int, **settings: bool | str | int) -> None:
        super().__init__(*args, **settings)  # type: ignore[arg-type]
        sides = [matrix.shape[0] for matrix in matricisations(self.weight)]
        self._sides = sides
        draws = torch.randn(sum(sides), generator=torch.Generator().manual_seed(0))
        self.register_buffer("power_vectors", draws)
        self.register_buffer("started", torch.tensor(False))
        self._started = False  # the buffer says so: to read it is to wait for the device

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._started = False
        super()._load_from_state_dict(*args, **kwargs)

    def initial_weight(self) -> Tensor:
        return nn.init.xavier_normal_(torch.empty(self.width, self.width, *self.kernel_size))

    @property
    def reach(self) -> float:
        """At least the norm of c S / σ."""
        area = self.kernel_size[0] * self.kernel_size[1]
        return 0.7 * math.sqrt(area) if area > 1 else 1.0

    @property
    def terms(self) -> int:
        """Of the series in eval mode."""
        terms = LEAST_TERMS
        while self.reach ** (terms + 1) / math.factorial(terms + 1) > 3e-6:
            terms += 1
        return terms

    def derive(self, size: object = None) -> Tensor:
        kernel = skew(self.weight)
        sigma = self._estimated(kernel) if self.training else self._computed(kernel)
        return kernel * ((0.7 if kernel.shape[2:].numel() > 1 else 1.0) / (sigma + 1e-12))

    def _computed(self, kernel: Tensor) -> Tensor:
        norms = [matrix_norm(matrix.detach()) for matrix in matricisations(kernel)]
        return torch.stack(norms).amin().to(kernel)

    def _estimated(self, kernel: Tensor) -> Tensor:
        """The smallest of four norms by power iteration from saved vectors: one step, 50 the first time."""
        self._started = self._started or bool(self.started)
        matrices = matricisations(kernel)
        vectors = list(self.power_vectors.to(kernel).split(self._sides))
        sigmas = []
        for number, matrix in enumerate(matrices):
            with torch.no_grad():
                left = vectors[number]
                for _ in range(1 if self._started else 50):
                    right = nn.functional.normalize(matrix.T @ left, dim=0)
                    left = nn.functional.normalize(matrix @ right, dim=0)
                vectors[number] = left
            sigmas.append(left @ matrix @ right)
        with torch.no_grad():
            self.power_vectors.copy_(torch.cat(vectors))
            if not self._started:
                self.started.fill_(True)
        return torch.stack(sigmas).amin()

    def forward(self, x: Tensor) -> Tensor:
        x = widen(self.unshuffled(x), self.width)
        y = convolution_exponential(
            x, self.derived(), TRAINING_TERMS if self.training else self.terms, self.padding_mode
        )
        y = y[:, : self.out_channels]
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)

    def lipschitz_bound(self) -> float:
        """1 + ‖L‖^(M+1) / (M+1)!, what the series' remainder can add to an orthogonal map."""
        return 1 + self.reach ** (self.terms + 1) / math.factorial(self.terms + 1)
