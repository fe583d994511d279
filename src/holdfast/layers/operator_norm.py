"""Operator norms from l_2 to l_2: certified upper bounds, and the estimate from below that training uses."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROUNDING = 1e-9
"""Relative; what float64 may lose in what is made of norms, and more."""

UNIT = torch.finfo(torch.float64).eps / 2


def operator_norm(layer: nn.Module, input_shape: tuple[int, ...] | None = None, *, estimate: bool = False) -> float:
    """An upper bound of the largest singular value of a dense layer or convolution, in float64, rounded up.

    Args:
        input_shape: of one example (C, H, W); a small convolution is then taken exactly as a matrix. It is
            needed for the estimate.
        estimate: power iteration in place of the bound: it comes from below and certifies nothing.

    Raises:
        ValueError: a layer of another kind; an estimate without an input shape.
    """
    if isinstance(layer, nn.Linear):
        weight = layer.weight.detach().double()
        if estimate:
            return float(power_iteration(lambda x: F.linear(x, weight), weight[:1] * 0, iterations=100))
        return float(matrix_norm(weight))
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        raise ValueError(f"{type(layer).__name__} is neither a dense layer nor a convolution")
    weight = layer.weight.detach().double()

    def forward(x: Tensor) -> Tensor:
        result: Tensor = layer._conv_forward(x, weight, None)
        return result

    if estimate:
        if input_shape is None:
            raise ValueError("the norm of a convolution depends on the size of its input: give input_shape")
        return float(power_iteration(forward, weight.new_zeros(1, *input_shape), iterations=100))
    circular = layer.padding_mode == "circular"
    repeats = layer.padding_mode in ("reflect", "replicate") or (circular and _laps(layer))
    if input_shape is not None and (repeats or is_small(forward, weight.new_zeros(1, *input_shape))):
        return float(dense_norm(forward, weight.new_zeros(1, *input_shape)))
    if repeats:
        raise ValueError(f"a convolution that pads {layer.padding_mode} entries so often needs input_shape")
    # Without the stride a circular one samples frequencies of its own; with it the phases need not fit.
    stride = (1,) * len(layer.stride) if circular else tuple(layer.stride)
    return float(convolution_norm(weight, stride, tuple(layer.dilation), layer.groups))


def _laps(layer: nn.Conv1d | nn.Conv2d) -> bool:
    """Whether circular padding makes more positions than the input has."""
    if isinstance(layer.padding, str):
        return False
    axes = zip(layer.padding, layer.kernel_size, layer.dilation, strict=True)
    return any(2 * p > d * (k - 1) for p, k, d in axes)


@torch.no_grad()
def matrix_norm(weight: Tensor) -> Tensor:
    """The largest singular value of a matrix (m, n), or of each of a batch, from its Gram matrix; rounded up."""
    weight = weight.to(torch.complex128 if weight.is_complex() else torch.float64)
    scale = weight.abs().amax((-2, -1), keepdim=True)  # squares neither vanish nor overflow
    unit = weight / torch.where(scale > 0, scale, 1)
    squares = _gram_spectrum(unit)[..., -1].clamp(min=0) + _gram_error(unit)
    return scale[..., 0, 0] * squares.sqrt() * (1 + 8 * UNIT)


@torch.no_grad()
def dense_norm(forward: Callable[[Tensor], Tensor], zero: Tensor) -> Tensor:
    """Of a linear (or affine) map, by its matrix; ``zero`` is an input (1, ...)."""
    columns = zero.numel()
    one = torch.eye(columns, dtype=torch.float64, device=zero.device)
    offset = forward(zero)
    parts = [forward(rows.to(zero).view(-1, *zero.shape[1:])) - offset for rows in one.split(512)]
    return matrix_norm(torch.cat(parts).flatten(1))


def is_small(forward: Callable[[Tensor], Tensor], zero: Tensor) -> bool:
    """Whether a map's matrix is small enough to be written down."""
    with torch.no_grad():
        outputs = forward(zero).numel()
    return zero.numel() * outputs <= 4_000_000 and min(zero.numel(), outputs) <= 1600


@torch.no_grad()
def convolution_norm(
    weight: Tensor,
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    grid: int = 64,
    torus: tuple[int, int] | None = None,
) -> Tensor:
    """sup_ω ‖ŵ(ω)‖₂, which no zero-padded convolution of any size exceeds, nor a circular one of stride 1 with no
    more positions than its input.

    A strided convolution is one of stride 1 on the s_1 · s_2 phases of its input. Between the frequencies of an
    N × N grid M. Riesz helps: a real trigonometric polynomial of degree k − 1 stays above M cos((k − 1) · distance)
    near its largest absolute value M, so that sup ‖ŵᴴŵ − c‖ is at most the maximum over the grid divided by
    Π cos(π (k − 1) / N) over the axes. With c in the middle of the spectrum that costs nothing where ŵ is
    orthogonal. A dilation relabels frequencies; beside a stride > 1 the stride is left out, which only loosens
    the bound.

    Args:
        weight: (out, in / groups, k) or (out, in / groups, k, k).
        torus: the only frequencies that occur, those of a torus of this size: exact for a circular convolution of
            stride 1; for images with p zeros around them a torus p larger keeps the border from wrapping round.
    """
    kernel = weight.double()
    if kernel.dim() == 3:
        kernel, stride, dilation = kernel[:, :, None], (1, *stride), (1, *dilation)
    if any(d > 1 for d in dilation):
        stride = (1, 1)
    # The phases of the kernel: (out, in · s_1 · s_2, k_1 / s_1, k_2 / s_2)
    missing = [-k % s for k, s in zip(kernel.shape[2:], stride, strict=True)]
    kernel = F.pad(kernel, (0, missing[1], 0, missing[0]))
    out, channels = kernel.shape[:2]
    high, wide = (k // s for k, s in zip(kernel.shape[2:], stride, strict=True))
    phases = kernel.view(out, channels, high, stride[0], wide, stride[1]).permute(0, 1, 3, 5, 2, 4)
    phases = phases.reshape(groups, out // groups, -1, high, wide)
    grid = max(grid, 4 * (max(high, wide) - 1))
    sizes = torus or tuple(1 if k == 1 else grid for k in (high, wide))  # a kernel of one entry has a flat spectrum
    slack = 1.0 if torus else math.prod(math.cos(math.pi * (k - 1) / grid) for k in (high, wide))
    largest = phases.new_zeros(())
    scale = phases.abs().amax().clamp(min=torch.finfo(torch.float64).tiny)
    for group in (phases / scale).unbind():
        spectrum = frequency_response(group, sizes).flatten(0, 1)
        error = torch.stack([_gram_error(part).amax() for part in spectrum.split(256)]).amax()
        values = torch.cat([_gram_spectrum(part)[..., [0, -1]] for part in spectrum.split(256)])
        least, most = values.amin() - error, values.amax() + error
        middle = (least + most) / 2
        squares = (middle + (most - middle) / slack).clamp(min=0)
        # Each wave errs by a few roundings of its angle, which is at most 2 π for each of its taps.
        taps = sum(group.shape[2:]) + math.prod(group.shape[2:])
        waves = 32 * taps * UNIT * group.abs().sum((2, 3)).norm()
        largest = torch.maximum(largest, squares.sqrt() + 2 * waves)
    return scale * largest * (1 + 8 * UNIT)


def frequency_response(kernel: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """ŵ at the frequencies of a torus, conjugate ones left out; (n_1, n_2 // 2 + 1, out, in) complex.

    Args:
        kernel: (out, in, k_1, k_2); it may be larger than the torus.
    """

    def waves(size: int, taps: int, count: int) -> Tensor:
        phase = torch.outer(torch.arange(count), torch.arange(taps)).to(kernel) * (-2 * math.pi / size)
        return torch.polar(torch.ones_like(phase), phase)

    rows = waves(sizes[0], kernel.shape[2], sizes[0])
    columns = waves(sizes[1], kernel.shape[3], sizes[1] // 2 + 1)
    half = torch.einsum("oiab,gb->goia", kernel.to(rows.dtype), columns)
    return torch.einsum("goia,fa->fgoi", half, rows)


def _gram_spectrum(matrices: Tensor) -> Tensor:
    """Squared singular values of each matrix, the smaller side's count, ascending; NaN where they overflow."""
    tall = matrices.shape[-2] >= matrices.shape[-1]
    gram = matrices.mH @ matrices if tall else matrices @ matrices.mH
    finite = gram.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    return torch.linalg.eigvalsh(gram.where(finite, 0)).where(finite[..., 0], torch.nan)


def _gram_error(matrices: Tensor) -> Tensor:
    """What rounding may take from the largest of the ``_gram_spectrum``, (...): γ_m ‖A‖_F² in the product of m
    terms (complex ones in four real operations each), and of its eigenvalues, backward stable, 16 n u ‖A‖_F²."""
    long, short = max(matrices.shape[-2:]), min(matrices.shape[-2:])
    return (4 * long + 16 * short + 16) * UNIT * matrices.abs().square().sum((-2, -1))


def start_of_iteration(zero: Tensor) -> Tensor:
    """Where a power iteration begins, by default: the same normal draws for all that have this shape."""
    return torch.randn(zero.shape, generator=torch.Generator().manual_seed(0)).to(zero)


def norm_from(
    left: Tensor, forward: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor], *, iterations: int
) -> tuple[Tensor, Tensor]:
    """``power_iteration`` of a linear map from where an earlier one ended: the norm, and where this one ends.

    Half an iteration was made by the application that gave ``left``, so that one costs two applications.

    Args:
        left: a left singular vector of the map as it was, (1, ...), of any length. One of zeros, that of a map that
            was zero, would stay what it is: waves take its place.
    """
    with torch.no_grad():
        waves = torch.arange(left.numel(), dtype=torch.float32, device=left.device).cos().to(left).view_as(left)
        left = torch.where(left.norm() > 0, left, waves)
        for _ in range(iterations - 1):
            left = forward(_unit(adjoint(left)))
        right = _unit(adjoint(left))
    image = forward(right)
    return image.norm(), image.detach()


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm().clamp(min=1e-30)


def power_iteration(forward: Callable[[Tensor], Tensor], zero: Tensor, *, iterations: int) -> Tensor:
    """An estimate from below of a linear (or affine) map's norm, differentiable in the map.

    The start is fixed; the singular vector is found without gradient, and the last application alone is
    differentiated: exact where the iteration has converged.

    Args:
        zero: an input (1, ...).
    """
    v = start_of_iteration(zero)
    with torch.no_grad():
        offset = forward(zero)
    for _ in range(iterations):
        with torch.enable_grad():
            v = (v / v.norm().clamp(min=1e-30)).requires_grad_(True)
            image = forward(v) - offset
            v = torch.autograd.grad(image, v, image.detach())[0].detach()
    v = v / v.norm().clamp(min=1e-30)
    return (forward(v) - forward(zero)).norm()
