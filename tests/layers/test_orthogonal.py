"""Björck's iteration against the original arrays; orthogonal kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from holdfast.layers.cayley import cayley
from holdfast.layers.lot import inverse_root
from holdfast.layers.operator_norm import frequency_response
from holdfast.layers.orthogonal import bjorck, block_kernel


def test_bjorck(reference: Callable[[str], dict[str, Tensor]]) -> None:
    arrays = {key: value.double() for key, value in reference("intriguing_llc_bjorck").items()}
    for steps in (3, 15):
        assert torch.allclose(bjorck(arrays["w"], steps), arrays[f"noscale_it{steps}"], rtol=0, atol=1e-9)
    assert torch.allclose(bjorck(arrays["w"].T, 15), arrays["noscale_it15"].T, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(4, 4), (4, 6), (6, 4)])
def test_block_kernels_are_orthogonal_at_every_frequency(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    for side in (1, 3, 5):
        matrices = torch.linalg.qr(torch.randn(2 * side - 1, 6, 6, dtype=torch.float64)).Q
        if max(shape) == 4:
            matrices = torch.linalg.qr(matrices[:, :4, :4]).Q
        kernel = block_kernel(matrices, *shape, side)
        assert kernel.shape == (*shape, side, side)
        values = torch.linalg.svdvals(frequency_response(kernel, (7, 8)))
        assert torch.allclose(values, torch.ones_like(values), atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (7, 2)])
def test_cayley(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    for dtype in (torch.float64, torch.complex128):
        values = torch.linalg.svdvals(cayley(3 * torch.randn(2, *shape, dtype=dtype)))
        assert torch.allclose(values, torch.ones_like(values), atol=1e-10)


def test_newton_comes_from_below() -> None:
    torch.manual_seed(0)
    w = torch.randn(5, 4, 6, dtype=torch.complex128)
    gram = w @ w.mH
    for steps in (1, 3, 10, 30):
        values = torch.linalg.svdvals(inverse_root(gram, steps) @ w)
        assert values.max() <= 1 + 1e-9
    assert values.min() >= 1 - 1e-9
