"""AOL layers against the original arrays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from holdfast.layers import AOLConv2d, AOLLinear
from holdfast.layers.aol import aol_rescaled, gram_row_sums

Reference = Callable[[str], dict[str, Tensor]]


@pytest.mark.parametrize("case", ["c3", "c1", "c53"])
def test_convolutions(case: str, reference: Reference) -> None:
    arrays = {key: value.double() for key, value in reference("intriguing_aol").items()}
    weight = arrays[f"{case}_weight"]
    layer = AOLConv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), bias=f"{case}_bias" in arrays)
    layer.double().load_state_dict(
        {"weight": weight} | ({"bias": arrays["c1_bias"]} if layer.bias is not None else {})
    )
    y = layer(arrays[f"{case}_x"])
    (y * arrays[f"{case}_cotangent"]).sum().backward()
    for found, expected in [
        (layer.effective_weight(), "kernel"),
        (y, "y"),
        (layer.weight.grad, "grad_weight"),
    ]:
        assert torch.allclose(found, arrays[f"{case}_{expected}"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", ["l75", "l57"])
def test_dense_layers(case: str, reference: Reference) -> None:
    arrays = {key: value.double() for key, value in reference("intriguing_aol").items()}
    weight = arrays[f"{case}_weight"]
    layer = AOLLinear(weight.shape[1], weight.shape[0], bias=False).double()
    layer.load_state_dict({"weight": weight})
    y = layer(arrays[f"{case}_x"])
    (y * arrays[f"{case}_cotangent"]).sum().backward()
    assert torch.allclose(layer.effective_weight(), arrays[f"{case}_weff"], rtol=0, atol=1e-9)
    assert torch.allclose(y, arrays[f"{case}_y"], rtol=0, atol=1e-9)
    assert torch.allclose(layer.weight.grad, arrays[f"{case}_grad_weight"], rtol=0, atol=1e-9)


def test_special_kernels(reference: Reference) -> None:
    arrays = reference("intriguing_aol")
    assert torch.allclose(AOLConv2d(4, 4).effective_weight(), arrays["dirac_kernel"].float(), rtol=0, atol=1e-7)
    zero = aol_rescaled(arrays["zeroin_weight"].double())
    assert torch.allclose(zero, arrays["zeroin_kernel"].double(), rtol=0, atol=1e-9)


def test_circular_padding_does_not_change_the_kernel() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 4, 3, 3)
    layers = [AOLConv2d(4, 6, padding_mode=mode) for mode in ("zeros", "circular")]
    for layer in layers:
        layer.weight.data = weight
    assert torch.equal(layers[0].effective_weight(), layers[1].effective_weight())


def test_row_sums_by_the_definition() -> None:
    weight = torch.randn(3, 2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = torch.tensor([0.5, 2.0], dtype=torch.float64)
    channels = weight.transpose(0, 1)
    correlations = torch.nn.functional.conv2d(channels, channels, padding=(2, 1)).abs().sum((2, 3))
    assert torch.allclose(gram_row_sums(weight, q), correlations @ q / q)
