"""Networks in rational arithmetic are what float64 nearly says of them."""

from __future__ import annotations

import math
from fractions import Fraction
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from holdfast.layers import Abs, MaxMin, Normalize


def every_layer(exact: ModuleType) -> nn.Sequential:
    model = nn.Sequential(
        Normalize([0.1, 0.3], [0.3, 0.7]),
        nn.Conv2d(2, 5, 3, padding=1),
        nn.BatchNorm2d(5, eps=0.0),
        MaxMin(),
        nn.MaxPool2d(2, 1),
        nn.AvgPool2d(3, 1),
        nn.Flatten(),
        nn.Linear(5, 6),
        nn.BatchNorm1d(6, eps=0.25),
        Abs(),
        exact.Residual(nn.Linear(6, 6), nn.LeakyReLU(0.125), nn.Linear(6, 6)),
        nn.Hardtanh(-1.0, 1.0),
        nn.Linear(6, 5),
        nn.ReLU(),
        nn.Linear(5, 3),
    )
    with torch.no_grad():
        model[2].running_var.copy_(torch.tensor([0.5, 1.0, 1.5, 0.25, 3.0]).square())
        model[2].running_mean.normal_()
        model[8].running_var.copy_(torch.full((6,), 2.0))  # with its eps 1.5²
    return model.double().eval()


def test_values_and_gradients_are_those_of_float64(exact: ModuleType) -> None:
    model, x = every_layer(exact), torch.rand(4, 2, 4, 4, dtype=torch.float64)
    network = exact.ExactNetwork(model, (2, 4, 4))
    for point in x:
        margins, gradient = network.margins(exact.exactly(point.flatten()), 1)
        free = point[None].clone().requires_grad_(True)
        logits = model(free)[0]
        expected = logits[1] - logits[[0, 2]]
        assert np.abs(np.array(margins.floats()) - expected.detach().numpy()).max() < 1e-12
        (slope,) = torch.autograd.grad(expected[1], free)
        found = torch.tensor([float(Fraction(n)) for n in gradient(1)], dtype=torch.float64)
        scale = found.abs().max() / slope.abs().max()
        torch.testing.assert_close(found / scale, slope.flatten(), rtol=0, atol=1e-12)


def test_smooth_layers_are_those_of_float64(exact: ModuleType, exact_smooth: ModuleType) -> None:
    smooth = [kind() for kind in exact_smooth.SMOOTH]
    norm, squared = nn.LayerNorm(6), exact_smooth.Squared()
    turned, mixed = [exact_smooth.Turned(6, over) for over in (False, True)], exact_smooth.Attention(2)
    for inner in (*smooth, norm, squared, *turned, mixed, nn.Softmax(1)):
        model = nn.Sequential(nn.Linear(3, 6), inner, nn.Linear(6, 3)).double().eval()
        point = 3 * torch.randn(3, dtype=torch.float64)
        margins, gradient = exact.ExactNetwork(model, (3,)).margins(exact.exactly(point), 1)
        free = point[None].clone().requires_grad_(True)
        logits = model(free)[0]
        expected = logits[1] - logits[[0, 2]]
        assert np.abs(np.array(margins.floats()) - expected.detach().numpy()).max() < 1e-12
        (slope,) = torch.autograd.grad(expected[1], free)
        places = gradient(1)
        found = torch.tensor([float(Fraction(n, abs(places).max())) for n in places], dtype=torch.float64)
        torch.testing.assert_close(found, slope.flatten() / slope.abs().max(), rtol=0, atol=1e-10)


def test_a_variance_without_a_rational_root_is_refused(exact: ModuleType) -> None:
    with pytest.raises(ValueError, match="no rational root"):
        exact.ExactNetwork(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)).eval(), (2,))


def test_floats_are_taken_as_they_are(exact: ModuleType) -> None:
    values = torch.tensor([0.1, -3.0, 0.0, 2.0**-149, 2.0**100], dtype=torch.float32)
    numbers = exact.exactly(values)
    assert [Fraction(top, numbers.bottom) for top in numbers.top] == [Fraction(v) for v in values.tolist()]
    with pytest.raises(ValueError, match="inf"):
        exact.exactly(math.inf)
