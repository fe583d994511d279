"""Operator norms against the singular values of the matrix."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from holdfast.layers import operator_norm
from holdfast.layers.operator_norm import convolution_norm, norm_from


def exact(layer: nn.Module, shape: tuple[int, ...]) -> float:
    size = int(torch.tensor(shape).prod())
    layer = layer.double()
    with torch.no_grad():
        rows = layer(torch.eye(size, dtype=torch.float64).view(-1, *shape)) - layer(torch.zeros(1, *shape).double())
    return float(torch.linalg.svdvals(rows.flatten(1))[0])


CONVOLUTIONS: dict[str, nn.Module] = {
    "3 x 3": nn.Conv2d(3, 5, 3, padding=1),
    "4 x 4, stride 2": nn.Conv2d(2, 6, 4, 2, 1),
    "3 x 3, stride 2": nn.Conv2d(3, 4, 3, 2, 1),
    "3 x 2, strides 1 and 2": nn.Conv2d(3, 4, (3, 2), (1, 2)),
    "groups": nn.Conv2d(4, 8, 3, padding=1, groups=2),
    "dilated": nn.Conv2d(2, 3, 3, padding=2, dilation=2),
    "dilated, stride 2": nn.Conv2d(2, 3, 3, 2, padding=2, dilation=2),
    "circular": nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
    "1 x 1": nn.Conv2d(6, 4, 1),
    "5 x 5": nn.Conv2d(1, 4, 5),
}


@pytest.mark.parametrize("layer", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_a_convolution_is_bounded_from_above_and_closely(layer: nn.Conv2d) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        nn.init.normal_(layer.weight)
        shape = (layer.in_channels, 12, 12)
        truth = exact(layer, shape)
        general = operator_norm(layer)
        assert (
            truth <= general <= truth * (1.6 if "dilated, stride" in str(layer) or layer.dilation[0] > 1 else 1.25)
        )
        small = operator_norm(layer, shape)
        assert truth <= small <= truth * (1 + 1e-8)
        assert operator_norm(layer, shape, estimate=True) <= truth * (1 + 1e-12)
        # Larger images come closer to the supremum, but never above it.
        assert exact(layer, (layer.in_channels, 20, 20)) <= general


def test_the_factor_of_the_grid_is_enough_for_a_polynomial_of_known_maximum() -> None:
    # ŵ(ω) = 1 + e^{iω} + e^{2iω} has its maximum 3 at 0; moved off the grid it must be found all the same.
    for grid in (8, 16, 64):
        phase = torch.pi / grid  # half a grid step
        weight = torch.stack([torch.cos(phase * torch.arange(3)), torch.sin(phase * torch.arange(3))]).double()
        kernel = torch.stack([weight, torch.stack([-weight[1], weight[0]])])  # the complex number as a rotation
        assert convolution_norm(kernel, (1,), (1,), 1, grid=grid) >= 3


def test_a_dense_layer_is_exact() -> None:
    layer = nn.Linear(30, 20)
    truth = torch.linalg.svdvals(layer.weight.detach().double())[0].item()
    assert truth <= operator_norm(layer) <= truth * (1 + 1e-8)
    with pytest.raises(ValueError, match="neither a dense layer nor a convolution"):
        operator_norm(nn.ReLU())
    with pytest.raises(ValueError, match="give input_shape"):
        operator_norm(nn.Conv2d(1, 1, 3), estimate=True)


def test_circular_padding_that_makes_more_positions_is_taken_as_a_matrix() -> None:
    for layer, shape in (
        (nn.Conv2d(1, 1, 1, padding=1, padding_mode="circular"), (1, 2, 2)),
        (nn.Conv2d(1, 1, 5, padding=4, padding_mode="circular"), (1, 5, 5)),
        (nn.Conv1d(1, 1, 2, stride=2, padding=1, padding_mode="circular"), (1, 3)),
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), (1, 6, 6)),
    ):
        nn.init.ones_(layer.weight)
        assert operator_norm(layer, shape) >= exact(layer, shape)
        with pytest.raises(ValueError, match="needs input_shape"):
            operator_norm(layer.float())
    strided = nn.Conv2d(1, 1, 3, stride=2, padding=1, padding_mode="circular")
    nn.init.ones_(strided.weight)
    assert operator_norm(strided) >= exact(strided, (1, 7, 7))


def test_an_iteration_goes_on_from_a_map_that_was_zero() -> None:
    torch.manual_seed(0)
    weight, left = torch.zeros(6, 9), torch.ones(1, 6)
    for _ in range(2):
        norm, left = norm_from(left, lambda v: v @ weight.T, lambda a: a @ weight, iterations=1)
        assert norm == 0
    weight = torch.randn(6, 9)
    for _ in range(100):
        norm, left = norm_from(left, lambda v: v @ weight.T, lambda a: a @ weight, iterations=1)
    assert norm.item() == pytest.approx(torch.linalg.matrix_norm(weight, 2).item(), rel=1e-5)
