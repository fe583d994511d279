"""Margins and last-layer elision."""

from __future__ import annotations

import torch
from helpers import images
from torch import nn

from holdfast import Threat
from holdfast.bounds import bound_margins, bound_outputs, margin_rows


def test_rows_are_the_other_classes_in_ascending_order() -> None:
    rows = margin_rows(torch.tensor([0, 2]), 3, torch.float32)
    assert rows[0].tolist() == [[1, -1, 0], [1, 0, -1]]
    assert rows[1].tolist() == [[-1, 0, 1], [0, -1, 1]]


def test_elision_is_never_looser_than_the_difference_of_the_logits_bounds() -> None:
    x, y = images(10)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))
    threat = Threat("linf", 0.1)
    lower, upper = bound_outputs(model, x, threat)
    others = torch.tensor([[j for j in range(4) if j != label] for label in y.tolist()])
    loose = lower.gather(1, y[:, None]) - upper.gather(1, others)
    elided = bound_margins(model, x, y, threat)
    assert (elided >= loose - 1e-5).all()
    assert (elided > loose + 1e-3).any()
