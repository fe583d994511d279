"""Parts of a region as they wait."""

from __future__ import annotations

import torch
from torch import nn

from holdfast.bounds.branching import Branching
from holdfast.bounds.graph import trace
from holdfast.bounds.interval import Interval
from holdfast.bounds.optimised import optimised
from holdfast.bounds.region import Box
from holdfast.bounds.rounding import Rounding


def test_parts_wait_in_little_memory_and_come_back_as_they_were() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    x = torch.randn(1, 4, dtype=torch.float64)
    graph = trace(model, x, box=(x - 1, x + 1))
    region = Box(Interval.between(x - 1, x + 1, Rounding.of(torch.float64)))
    rows = torch.tensor([[[1.0, -1.0, 0.0]], [[0.0, 1.0, -1.0]]], dtype=torch.float64)
    root = optimised(graph, region, rows.flatten(0, 1)[None], 3)
    assert root is not None
    branching = Branching(graph, region, rows, rows.new_zeros(2, 1), root)
    with torch.no_grad():
        parts = branching.whole()
        for _ in range(2):
            parts = branching.bounded(branching.split(parts, branching.choice(parts)), 4)
        again = branching.waiting.unpacked(branching.waiting.packed(parts))
        assert len(again) == 8
        for name in ("clause", "lower", "weights"):
            assert torch.equal(getattr(again, name), getattr(parts, name))
        for source, signs in parts.signs.items():
            assert torch.equal(again.signs[source], signs)
            held = parts.multipliers[source] * signs
            assert torch.allclose(again.multipliers[source] * signs, held, rtol=1e-6)
        # slopes are rounded, but on neurons that are unstable somewhere only by so much
        assert torch.allclose(branching.bounds(again), parts.lower, rtol=1e-2, atol=1e-2)
