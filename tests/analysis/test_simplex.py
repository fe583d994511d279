"""The geometry of class means: by its definitions."""

from __future__ import annotations

import math

import torch

from holdfast.analysis import leap_matrix
from holdfast.analysis.simplex import angle_between


def test_angles_by_their_definition_and_never_nan() -> None:
    angle = torch.tensor([0.0, 1e-9, 0.3, math.pi / 2, math.pi], dtype=torch.float64)
    a = torch.tensor([[2.0, 0.0]], dtype=torch.float64).expand(5, 2)
    b = 7 * torch.stack([angle.cos(), angle.sin()], 1)
    assert torch.allclose(angle_between(a, b), angle, atol=1e-12)
    x = torch.randn(1000, 64)
    assert (angle_between(x, x) == 0).all()


def test_leaps_go_to_the_nearest_clean_centre() -> None:
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [math.nan, math.nan]])
    x = torch.tensor([[1.0, 1.0], [9.0, 0.0], [0.0, 9.0], [1.0, 8.0]])
    leaps = leap_matrix(x, torch.tensor([0, 0, 1, 3]), centres)
    assert leaps.tolist() == [[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 1, 0]]
