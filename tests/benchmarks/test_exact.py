"""The oracle of the soundness benchmark: exact where floats are nearly so, and right where they are not."""

from __future__ import annotations

import math
from fractions import Fraction
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from holdfast import Threat
from holdfast.layers import Abs, MaxMin, Normalize


def every_layer(exact: ModuleType) -> nn.Sequential:
    model = nn.Sequential(
        Normalize([0.1, 0.3], [0.3, 0.7]),
        nn.Conv2d(2, 5, 3, padding=1),
        nn.BatchNorm2d(5, eps=0.0),
        MaxMin(),
        nn.MaxPool2d(2),
        nn.AvgPool2d(2, 1),
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


def test_a_variance_without_a_rational_root_is_refused(exact: ModuleType) -> None:
    with pytest.raises(ValueError, match="no rational root"):
        exact.ExactNetwork(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)).eval(), (2,))


def test_floats_are_taken_as_they_are(exact: ModuleType) -> None:
    values = torch.tensor([0.1, -3.0, 0.0, 2.0**-149, 2.0**100], dtype=torch.float32)
    numbers = exact.exactly(values)
    assert [Fraction(top, numbers.bottom) for top in numbers.top] == [Fraction(v) for v in values.tolist()]
    with pytest.raises(ValueError, match="inf"):
        exact.exactly(math.inf)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("box", [(0.0, 1.0), (-math.inf, math.inf)])
def test_the_worst_point_is_in_the_set_and_as_bad_as_its_support_says(
    exact: ModuleType, norm: str, box: tuple[float, float]
) -> None:
    x, weight = torch.rand(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    weight[2] = 0
    for eps in (0.0, 0.01, 0.3, 2.0, 20.0):
        region = exact.ExactRegion.ball(x, norm, eps, *box)
        point = region.worst(exact.exactly(weight).top)
        assert region.holds(point)
        found = weight @ (torch.tensor(point.floats(), dtype=torch.float64) - x)
        support = Threat(norm, eps, *box).support(x[None], -weight[None])
        torch.testing.assert_close(-found[None], support, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_points_come_into_the_set_and_stay_where_they_are_in_it(exact: ModuleType, norm: str) -> None:
    x = torch.rand(5, dtype=torch.float64)
    region = exact.ExactRegion.ball(x, norm, 0.25, 0.0, 1.0)
    for far in torch.randn(20, 5, dtype=torch.float64):
        assert region.holds(region.nearby(far))
        assert not region.holds(exact.exactly(far + 3))
    inside = (x + 0.04).clamp(max=1)
    assert region.nearby(inside).floats() == inside.tolist()


def one_by_one(*layers: tuple[list[list[float]], list[float]]) -> nn.Sequential:
    """Dense layers with these weights and biases, ReLUs between them."""
    modules: list[nn.Module] = []
    for weight, bias in layers:
        dense = nn.Linear(len(weight[0]), len(weight))
        with torch.no_grad():
            dense.weight.copy_(torch.tensor(weight)), dense.bias.copy_(torch.tensor(bias))
        modules += [dense, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def test_it_finds_the_edge_of_a_linear_network_to_the_last_place(exact: ModuleType) -> None:
    network = exact.ExactNetwork(one_by_one(([[1.0], [0.0]], [0.0, 0.0])), (1,))
    x = torch.tensor([0.5])
    at, below = (exact.ExactRegion.ball(x, "l2", eps, -1.0, 1.0) for eps in (0.5, math.nextafter(0.5, 0)))
    found = exact.counterexample(network, at, 0)
    assert found is not None, "a tie at the end of the closed set"
    assert exact.counterexample(network, below, 0) is None


def test_it_finds_what_a_bias_of_2_to_the_24_hides(exact: ModuleType) -> None:
    large = 2.0**24
    model = one_by_one(([[1.0]], [0.0]), ([[1.0]], [large]), ([[-1.0], [0.0]], [large, -1.0]))
    region = exact.ExactRegion.ball(torch.tensor([0.95]), "linf", 0.15, 0.0, 2.0)
    point = exact.counterexample(exact.ExactNetwork(model, (1,)), region, 0)
    assert point is not None
    assert 1 <= point.floats()[0] <= 1.1


def test_what_no_climb_reaches_it_finds_from_where_an_attack_was(exact: ModuleType) -> None:
    # The margin is 1 − 4 max(0, x − 0.5): flat around x = 0, where there is nothing to climb.
    model = one_by_one(([[1.0]], [-0.5]), ([[-4.0], [0.0]], [1.0, 0.0]))
    network, region = exact.ExactNetwork(model, (1,)), exact.ExactRegion.ball(torch.zeros(1), "linf", 1.0, -1, 1)
    attacked: Tensor = torch.tensor([0.6])
    assert exact.counterexample(network, region, 0) is None
    assert exact.counterexample(network, region, 0, [region.nearby(attacked)]) is not None
