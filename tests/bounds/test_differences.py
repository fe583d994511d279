"""Margins as differences: against the one-hot rows that they stand for, and what is held at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from helpers import Largest
from torch import Tensor, nn

from holdfast import Threat
from holdfast.bounds import differences, interval_margins, margin_rows, region_of, trace


@contextmanager
def pieces_of(entries: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(differences, "PIECE", entries)
        yield


@pytest.mark.parametrize("piece", [1, 60, 2**18])
def test_values_and_gradients_are_those_of_the_rows(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    matrix, radius = torch.randn(5, 7).double().requires_grad_(), torch.rand(9, 7).double().requires_grad_()
    logits, y, up = torch.randn(9, 5).double(), torch.randint(0, 5, (9,)), torch.randn(9, 4).double()
    rows = margin_rows(y, 5, torch.float64)
    with pieces_of(piece, monkeypatch):
        found = differences.reach(matrix, radius, y)
        gradients = torch.autograd.grad((found * up).sum(), (matrix, radius))
    expected = ((rows @ matrix).abs() @ radius[:, :, None])[:, :, 0]
    assert torch.allclose(found, expected, atol=1e-12)
    for gradient, other in zip(
        gradients, torch.autograd.grad((expected * up).sum(), (matrix, radius)), strict=True
    ):
        assert torch.allclose(gradient, other, atol=1e-12)
    assert torch.equal(differences.differences(logits, y), (rows @ logits[:, :, None])[:, :, 0])
    assert torch.allclose(differences.sums(logits.abs(), y), (rows.abs() @ logits.abs()[:, :, None])[:, :, 0])
    assert torch.allclose(differences.combined(up, y, 5), torch.bmm(up[:, None], rows)[:, 0], atol=1e-12)


def test_equal_rows_have_no_slope() -> None:
    matrix = torch.ones(3, 4, requires_grad=True)
    found = differences.reach(matrix, torch.ones(2, 4), torch.tensor([0, 2]))
    found.sum().backward()
    assert not found.any()
    assert not matrix.grad.any()


def test_interval_margins_of_many_classes_hold_no_row_of_each() -> None:
    classes, width, examples = 300, 64, 32
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, classes))
    x, y = torch.rand(examples, 8), torch.randint(0, classes, (examples,))
    graph, region = trace(model, x), region_of(x, Threat("linf", 0.1))
    with Largest() as largest:
        margins: Tensor = interval_margins(graph, region, y).lower
        margins.sum().backward()
    assert largest.entries <= max(differences.PIECE, classes * width)
    assert largest.entries < examples * classes * width
