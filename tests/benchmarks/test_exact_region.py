"""The oracle of the soundness benchmark: worst points of the closed set, and what hides from floats."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from holdfast import Threat


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("box", [(0.0, 1.0), (-math.inf, math.inf)])
def test_the_worst_point_is_in_the_set_and_as_bad_as_its_support_says(
    exact: ModuleType, exact_region: ModuleType, norm: str, box: tuple[float, float]
) -> None:
    x, weight = torch.rand(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    weight[2] = 0
    for eps in (0.0, 0.01, 0.3, 2.0, 20.0):
        region = exact_region.ExactRegion.ball(x, norm, eps, *box)
        point = region.worst(exact.exactly(weight).top)
        assert region.holds(point)
        found = weight @ (torch.tensor(point.floats(), dtype=torch.float64) - x)
        support = Threat(norm, eps, *box).support(x[None], -weight[None])
        torch.testing.assert_close(-found[None], support, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_points_come_into_the_set_and_stay_where_they_are_in_it(
    exact: ModuleType, exact_region: ModuleType, norm: str
) -> None:
    x = torch.rand(5, dtype=torch.float64)
    region = exact_region.ExactRegion.ball(x, norm, 0.25, 0.0, 1.0)
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


def test_it_finds_the_edge_of_a_linear_network_to_the_last_place(
    exact: ModuleType, exact_region: ModuleType
) -> None:
    network = exact.ExactNetwork(one_by_one(([[1.0], [0.0]], [0.0, 0.0])), (1,))
    x = torch.tensor([0.5])
    at, below = (exact_region.ExactRegion.ball(x, "l2", eps, -1.0, 1.0) for eps in (0.5, math.nextafter(0.5, 0)))
    found = exact_region.counterexample(network, at, 0)
    assert found is not None, "a tie at the end of the closed set"
    assert exact_region.counterexample(network, below, 0) is None


def test_it_finds_what_a_bias_of_2_to_the_24_hides(exact: ModuleType, exact_region: ModuleType) -> None:
    large = 2.0**24
    model = one_by_one(([[1.0]], [0.0]), ([[1.0]], [large]), ([[-1.0], [0.0]], [large, -1.0]))
    region = exact_region.ExactRegion.ball(torch.tensor([0.95]), "linf", 0.15, 0.0, 2.0)
    point = exact_region.counterexample(exact.ExactNetwork(model, (1,)), region, 0)
    assert point is not None
    assert 1 <= point.floats()[0] <= 1.1


def test_what_no_climb_reaches_it_finds_from_where_an_attack_was(
    exact: ModuleType, exact_region: ModuleType
) -> None:
    # The margin is 1 − 4 max(0, x − 0.5): flat around x = 0, where there is nothing to climb.
    model = one_by_one(([[1.0]], [-0.5]), ([[-4.0], [0.0]], [1.0, 0.0]))
    network, region = (
        exact.ExactNetwork(model, (1,)),
        exact_region.ExactRegion.ball(torch.zeros(1), "linf", 1.0, -1, 1),
    )
    attacked: Tensor = torch.tensor([0.6])
    assert exact_region.counterexample(network, region, 0) is None
    assert exact_region.counterexample(network, region, 0, [region.nearby(attacked)]) is not None
