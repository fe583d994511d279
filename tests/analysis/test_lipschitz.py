"""Jacobian norms and network constants where they are known."""

from __future__ import annotations

import pytest
import torch
from helpers import IN_PLACE, images, twins
from torch import nn

from holdfast import Threat
from holdfast.analysis import jacobian_norm, network_constant
from holdfast.layers import AOLLinear, MaxMin


def test_the_jacobian_of_a_linear_map() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(5, 7, dtype=torch.float64)
    found = jacobian_norm(lambda x: x @ matrix.T, torch.randn(3, 7, dtype=torch.float64), iterations=200)
    assert torch.allclose(found, torch.linalg.svdvals(matrix)[0].expand(3))


def test_the_jacobian_hangs_on_no_mode_of_the_caller_and_on_no_type_of_the_answer() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(5, 7).bfloat16().float()  # which bfloat16 holds
    x = torch.randn(3, 7)
    expected = torch.linalg.svdvals(matrix)[0].expand(3)
    with torch.inference_mode():
        inside = jacobian_norm(lambda x: x @ matrix.T, x.clone(), iterations=100)
    assert torch.allclose(inside, expected, rtol=1e-4)
    assert not inside.is_inference()
    assert torch.allclose(jacobian_norm(lambda x: x @ matrix.T, x.numpy(), iterations=100), expected, rtol=1e-4)
    short = jacobian_norm(lambda x: (x @ matrix.T).bfloat16(), x, iterations=100)
    assert short.dtype == torch.float32
    assert torch.allclose(short, expected, rtol=0.02)


def test_the_constant_of_a_linear_network_from_both_sides() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(6, 5, bias=False), nn.Linear(5, 3)
    model = nn.Sequential(nn.Flatten(), first, second).double()
    whole = torch.linalg.svdvals(second.weight @ first.weight)[0].item()
    constant = network_constant(model, torch.rand(8, 1, 2, 3, dtype=torch.float64), Threat("l2", 0.5))
    assert constant.found <= whole * (1 + 1e-6)
    assert constant.found >= 0.98 * whole
    assert constant.verified >= whole
    assert [layer.path for layer in constant.layers] == ["1", "2"]
    for layer, module in zip(constant.layers, (first, second), strict=True):
        exact = torch.linalg.svdvals(module.weight)[0].item()
        assert layer.found <= exact * (1 + 1e-9)
        assert exact <= layer.verified <= exact * (1 + 1e-6)


def test_layers_are_left_as_they_were() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), AOLLinear(4, 4), MaxMin(), AOLLinear(4, 3)).train()
    constant = network_constant(model, torch.rand(4, 1, 2, 2), Threat("l2", 0.1))
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert constant.found <= constant.verified * (1 + 1e-6)  # float32 rounds what is found
    assert constant.verified <= 1.0001


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_model_that_works_in_place_has_the_constant_of_one_that_does_not(name: str) -> None:
    (hasty, plain), (x, _) = twins(name), images(4)
    before = x.clone()
    constant, expected = (network_constant(model, x, Threat("l2", 0.1)) for model in (hasty, plain))
    assert torch.equal(x, before)
    assert (constant.verified, constant.found) == (expected.verified, expected.found)
