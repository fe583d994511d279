"""Skew orthogonal convolutions against the original arrays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from holdfast.layers import SOCConv2d
from holdfast.layers.lipschitz import widen
from holdfast.layers.operator_norm import matrix_norm
from holdfast.layers.soc import convolution_exponential, matricisations, skew

Reference = Callable[[str], dict[str, Tensor]]


@pytest.mark.parametrize("case", ["c3", "c1", "up", "down"])
def test_the_original(case: str, reference: Reference) -> None:
    arrays = {key: value.double() for key, value in reference("intriguing_llc_soc").items()}
    weight, bias, x = (arrays[f"{case}_{name}"] for name in ("filter", "bias", "x"))
    kernel = skew(weight) * (0.7 if weight.shape[2] > 1 else 1.0)
    for output, sigma, terms in [
        ("train1_y", "sigma_after_train1", 5),
        ("eval_after_3_train_y", "sigma_after_train3", 12),
    ]:
        y = convolution_exponential(widen(x, len(weight)), kernel / arrays[f"{case}_{sigma}"], terms)
        y = y[:, : len(bias)] + bias.view(-1, 1, 1)
        assert torch.allclose(y, arrays[f"{case}_{output}"], rtol=0, atol=1e-9)
    layer = SOCConv2d(x.shape[1], len(bias), weight.shape[2]).double().eval()
    state = {**layer.state_dict(), "weight": weight, "bias": bias}
    layer.load_state_dict(state)
    # Theirs had not converged after 52 steps of power iteration.
    assert torch.allclose(layer(x), arrays[f"{case}_eval_after_3_train_y"], rtol=0, atol=2e-4)
    layer.train()(x)
    assert torch.allclose(layer(x), arrays[f"{case}_train1_y"], rtol=0, atol=2e-3)


def test_matricisations_bound_the_convolution() -> None:
    torch.manual_seed(0)
    kernel = torch.randn(3, 3, 3, 3, dtype=torch.float64)
    columns = torch.eye(3 * 49, dtype=torch.float64).view(-1, 3, 7, 7)
    matrix = torch.nn.functional.conv2d(columns, kernel, padding=1).flatten(1)
    norms = [matrix_norm(one) for one in matricisations(kernel)]
    assert torch.linalg.svdvals(matrix)[0] <= 3 * min(norms)


def test_the_series_is_long_enough_for_every_kernel() -> None:
    assert [SOCConv2d(2, 2, side).terms for side in (1, 3, 5, 7)][:2] == [12, 12]
    for side in (1, 3, 5, 7):
        assert SOCConv2d(2, 2, side).lipschitz_bound() <= 1 + 3e-6
