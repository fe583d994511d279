"""The staircase against the published notebook's fits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from holdfast.analysis import staircase


def sample(arrays: dict[str, Tensor]) -> staircase.Points:
    return staircase.Points(arrays["train_x"].numpy(), arrays["train_y"])


def test_features_and_roughness_are_the_published_ones(reference: Callable[[str], dict[str, Tensor]]) -> None:
    arrays = reference("lolip_splines_n40")
    assert torch.allclose(staircase.features(arrays["train_x"].numpy()), arrays["features_train"], atol=1e-12)
    assert torch.allclose(
        staircase.features(arrays["features_grid_x"].numpy()), arrays["features_grid"], atol=1e-12
    )
    assert torch.equal(staircase.ROUGHNESS, arrays["P"])


@pytest.mark.parametrize(
    ("method", "theirs"),
    [
        *(("natural", "normal"), ("adversarial", "adv"), ("clean-plus-adversarial (0.5)", "betaadv_5")),
        *(("clean-plus-adversarial (1)", "betaadv"), ("clean-plus-adversarial (2)", "betaadv2")),
        *(("trades (1)", "trd_0"), ("trades (3)", "trd_1"), ("trades (6)", "trd_10")),
    ],
)
def test_the_training_objective_is_as_low_as_the_published_solution(
    reference: Callable[[str], dict[str, Tensor]], method: str, theirs: str
) -> None:
    arrays = reference("lolip_splines_n40")
    points, loss = sample(arrays), staircase.METHODS[method]
    theta, published = staircase.fit(loss, points), arrays[f"theta_{theirs}"]
    goal = staircase.Penalised(loss, points, 1e-7)
    own, other = goal.value(theta.numpy()), goal.value(published.numpy())
    assert own == pytest.approx(other, rel=1e-4)
    assert own <= other * (1 + 1e-6)
    if method == "natural":
        assert torch.allclose(theta, published, atol=1e-6)
        table = dict(zip(("mse", "test", "adversarial_mse"), arrays["full"][0].tolist(), strict=False))
        found = staircase.errors(theta, points)
        assert found["mse"] == pytest.approx(table["mse"], abs=5e-5)
        assert found["adversarial_mse"] == pytest.approx(table["adversarial_mse"], abs=5e-5)


def test_derivatives_by_finite_differences() -> None:
    points = staircase.Points.draw(30, seed=3)
    theta = np.random.default_rng(0).standard_normal(34)
    for loss in staircase.METHODS.values():
        goal = staircase.Penalised(loss, points, 0.3)
        gradient, hessian = goal.gradient(theta), goal.hessian(theta)
        for i in (7, 12):
            step = 1e-5 * np.eye(34)[i]
            slope = (goal.value(theta + step) - goal.value(theta - step)) / 2e-5
            bend = (goal.gradient(theta + step) - goal.gradient(theta - step)) / 2e-5
            assert gradient[i] == pytest.approx(slope, rel=1e-5, abs=1e-5)
            assert np.allclose(hessian[i], bend, rtol=1e-4, atol=1e-3)


def test_the_soft_maximum_lies_just_above() -> None:
    values = torch.randn(50, 3, dtype=torch.float64)
    soft = staircase.soft_max(values, 1e-3)
    assert (soft >= values.amax(1) - 1e-12).all()
    assert (soft <= values.amax(1) + 1e-3 * np.log(3) + 1e-12).all()


def test_few_points_make_robustness_cost_accuracy_many_do_not() -> None:
    table, curves = staircase.staircase((40, 1000))
    table = table.set_index(["points", "method"])
    assert len(table) == 2 * len(staircase.METHODS)
    assert set(curves["method"]) == set(staircase.METHODS)
    few, many = table.loc[40], table.loc[1000]
    assert few.loc["adversarial", "test_mse"] > 3 * few.loc["natural", "test_mse"]
    assert many.loc["adversarial", "test_mse"] < few.loc["adversarial", "test_mse"] / 3
    assert (few["adversarial_test_mse"] >= few["test_mse"]).all()
