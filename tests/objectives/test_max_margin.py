"""Max-margin training on a linear model, where the boundary is known."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import linear_model, linear_radius

from holdfast import Threat
from holdfast.attacks.losses import gap
from holdfast.objectives import MMA, Progress


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_boundary_of_a_linear_model(norm: str) -> None:
    model = linear_model(classes=2).double()
    x = torch.rand(200, 1, 2, 3, dtype=torch.float64)
    y = model(x).argmax(1)
    y[:20] = 1 - y[:20]
    eps = {"linf": 0.2, "l2": 0.5}[norm]
    radius = linear_radius(model, x, y, norm)
    threat = Threat(norm, eps, -math.inf, math.inf)
    loss = MMA(steps=30, hinge=1.5, bisections=30).loss(model, x, y, threat, Progress.end())
    wrong, beyond = radius < 0, radius > 1.5 * eps
    near = (radius > 0) & (radius < 1.45 * eps)
    assert min(int(wrong.sum()), int(beyond.sum()), int(near.sum())) >= 15
    distance = threat.distance(x, loss.x_adv)
    assert (distance[wrong | beyond] == 0).all()
    assert (distance[near] >= radius[near] * (1 - 1e-6)).all()
    assert torch.allclose(gap(model(loss.x_adv), y)[near], torch.zeros(int(near.sum())).double(), atol=1e-6)
    # PGD from a random start of a linear model ends where its gradient points, up to the ball's corners.
    assert (distance[near] / radius[near]).median() < 1.1
    counts = (distance > 0) | wrong
    robust = (counts * F.cross_entropy(model(loss.x_adv), y, reduction="none")).mean()
    assert torch.allclose(loss.total, F.cross_entropy(model(x), y) / 3 + 2 / 3 * robust)
