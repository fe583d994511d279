"""Choices made in a fast precision: their bounds are those of the exact pass, up to rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from holdfast.bounds.branching import Branching
from holdfast.bounds.graph import trace
from holdfast.bounds.interval import Interval
from holdfast.bounds.optimised import optimised
from holdfast.bounds.region import Box
from holdfast.bounds.rounding import Rounding


class TwoReaders(nn.Module):
    """Two activations read one value: a ReLU and a leaky one; and a sigmoid, which no split makes exact."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other = nn.Linear(3, 8), nn.Linear(3, 8)
        self.leaky, self.last = nn.LeakyReLU(0.1), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        v = self.first(x)
        found: Tensor = self.last(torch.relu(v) - self.leaky(v) * 0.5 + torch.sigmoid(self.other(x)))
        return found


def branching(model: nn.Module) -> Branching:
    """In float64, with choices in float32."""
    x = torch.randn(1, 3, generator=torch.Generator().manual_seed(1))
    fast = trace(model, x, box=(x - 1, x + 1)), x.new_empty(0)
    ends = (x - 1).double(), (x + 1).double()
    graph = trace(copy.deepcopy(model).double(), x.double(), box=ends)
    region = Box(Interval.between(*ends, Rounding.of(torch.float64)))
    rows = torch.tensor([[[1.0, -1.0], [-1.0, 1.0]], [[0.5, 1.0], [0.0, 1.0]]], dtype=torch.float64)
    root = optimised(graph, region, rows.flatten(0, 1)[None], 3)
    assert root is not None
    offsets = torch.tensor([[0.1, 0.0], [0.0, -0.2]], dtype=torch.float64)
    return Branching(graph, region, rows, offsets, root, fast)


@pytest.mark.parametrize("kind", ["dense", "two readers"])
def test_its_bounds_are_those_of_the_exact_pass_up_to_rounding(kind: str) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    parts = branching(dense if kind == "dense" else TwoReaders())
    assert parts.climb.place.dtype == torch.float32
    with torch.no_grad():
        domains = parts.whole()
        for _ in range(3):
            raised = parts.climb.raised(domains, 5, torch.inf, lambda: True)
            assert torch.allclose(parts.climb.bounds(raised).double(), parts.bounds(raised), atol=1e-4)
            better = parts.climb.raised(domains, 20, torch.inf, lambda: True)
            assert (parts.climb.bounds(better) >= parts.climb.bounds(domains) - 1e-5).all()
            pick = parts.choice(domains)
            assert (pick >= 0).all()
            domains = parts.bounded(parts.split(domains, pick), 5)
        found = parts.climb.linear(domains)
        assert found.coefficients.shape == (len(domains), 1, 3)


def test_what_is_high_enough_is_left_alone_and_so_is_all_when_the_time_is_up() -> None:
    torch.manual_seed(0)
    parts = branching(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
    domains, asked = parts.whole(), []

    def twice() -> bool:
        asked.append(1)
        return len(asked) <= 2

    with torch.no_grad():
        start = parts.climb.raised(domains, 20, -torch.inf, lambda: True)  # everything is above
        for number, slope in start.slopes.items():
            assert torch.allclose(slope, domains.slopes[number], atol=1e-6)
        parts.climb.raised(domains, 20, torch.inf, twice)
        assert len(asked) == 3
