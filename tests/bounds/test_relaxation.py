"""What the rules claim of each activation: curvature, steepness, turning points."""

from __future__ import annotations

import pytest
import torch

from holdfast.bounds import Elementwise
from holdfast.bounds.kinds import ABS, RELU, SIGMOID, SILU, TANH, between, elu, gelu, leaky

ACTIVATIONS = {
    "relu": RELU,
    "leaky": leaky(0.2),
    "steep leaky": leaky(1.7),
    "abs": ABS,
    "clamp": between(-0.3, 0.4),
    "elu": elu(0.7),
    "steep elu": elu(1.6),
    "sigmoid": SIGMOID,
    "tanh": TANH,
    "silu": SILU,
    "gelu": gelu(),
    "gelu tanh": gelu("tanh"),
}


@pytest.mark.parametrize("operator", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
def test_claims_hold_on_a_fine_grid(operator: Elementwise) -> None:
    v = torch.linspace(-8, 8, 160_001, dtype=torch.float64)
    slope = operator.function(v).diff() / v.diff()
    assert slope.abs().max() <= operator.steepest + 1e-9
    middle = (v[1:] + v[:-1]) / 2
    bend = slope.diff() / middle.diff()
    smooth = torch.ones_like(bend, dtype=torch.bool)
    for kink in operator.kinks:
        smooth &= (v[1:-1] - kink).abs() > 2e-4
    assert bend[smooth].abs().max() <= operator.curvature + 1e-6
    signs = slope[slope.abs() > 1e-9].sign()
    assert int((signs.diff() != 0).sum()) == len(operator.turns)


def test_curvature_and_steepness_cannot_be_left_out() -> None:
    with pytest.raises(TypeError, match="curvature"):
        Elementwise(torch.tanh)  # type: ignore[call-arg]
