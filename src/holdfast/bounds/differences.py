"""The margins z_y − z_j, j ≠ y ascending, as differences: nothing of size N · K² or N · K · d is held at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE = 2**18
"""Entries of W_y − W_j that are held at a time: what a cache holds, where one example has no more."""


def others(y: Tensor, classes: int) -> Tensor:
    """The classes j ≠ y of each example, ascending, (N, K−1)."""
    number = torch.arange(classes - 1, device=y.device)
    return number + (number >= y[:, None])


def differences(logits: Tensor, y: Tensor) -> Tensor:
    """z_y − z_j, (N, K−1), of (N, K)."""
    return logits.gather(1, y[:, None]) - logits.gather(1, others(y, logits.shape[1]))


def sums(sizes: Tensor, y: Tensor) -> Tensor:
    """s_y + s_j, (N, K−1), of (N, K): |e_y − e_j| in place of e_y − e_j."""
    return sizes.gather(1, y[:, None]) + sizes.gather(1, others(y, sizes.shape[1]))


def combined(weights: Tensor, y: Tensor, classes: int) -> Tensor:
    """Σ_j w_j (e_y − e_j), (N, K), of weights (N, K−1)."""
    spread = weights.new_zeros(len(y), classes).scatter(1, others(y, classes), -weights)
    return spread.scatter(1, y[:, None], weights.sum(1, keepdim=True))


def reach(matrix: Tensor, radius: Tensor, y: Tensor) -> Tensor:
    """|W_y − W_j| r, (N, K−1), of W (K, d) and r (N, d)."""
    every: Tensor = _Reach.apply(matrix, radius, y)
    return every.gather(1, others(y, len(matrix)))


class _Reach(torch.autograd.Function):
    """|W_y − W_j| r for every class, (N, K), a few examples at a time; sums in an order that is always the same."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, radius: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(matrix, radius, y)
        found = [
            torch.bmm(_gaps(matrix, own).abs_(), r[:, :, None])[:, :, 0] for own, r in _pieces(matrix, y, radius)
        ]
        return torch.cat(found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        matrix, radius, y = ctx.saved_tensors
        of_matrix, of_own, of_radius = torch.zeros_like(matrix), [], []
        for own, r, up in _pieces(matrix, y, radius, upstream.to(matrix.dtype)):  # autocast lowered the products
            gaps = _gaps(matrix, own)
            if ctx.needs_input_grad[1]:
                of_radius.append(torch.bmm(up[:, None], gaps.abs())[:, 0])
            if ctx.needs_input_grad[0]:
                signs = gaps.sign_()
                of_own.append(torch.bmm(up[:, None], signs)[:, 0] * r)
                for sign, u, v in zip(signs, up, r, strict=True):
                    of_matrix.addcmul_(sign.mul_(u[:, None]), v, value=-1)
        if of_own:
            of_matrix += F.one_hot(y, len(matrix)).to(matrix).T @ torch.cat(of_own)
        return (
            of_matrix if ctx.needs_input_grad[0] else None,
            torch.cat(of_radius) if of_radius else None,
            None,
        )


def _gaps(matrix: Tensor, own: Tensor) -> Tensor:
    """W_y − W_j for every j, (n, K, d)."""
    return matrix[own][:, None] - matrix


def _pieces(matrix: Tensor, *tensors: Tensor) -> Any:
    size = max(1, PIECE // max(1, matrix.numel()))
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)
