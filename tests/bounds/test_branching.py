"""Bounds of parts of a box: they hold on their part, for whatever multipliers, and the linear program is exact."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from holdfast.bounds.branching import Branching, Domains
from holdfast.bounds.graph import trace
from holdfast.bounds.interval import Interval
from holdfast.bounds.operators import computed
from holdfast.bounds.optimised import optimised
from holdfast.bounds.region import Box
from holdfast.bounds.rounding import Rounding


class Residual(nn.Module):
    """Two ReLUs read one value, which is a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = h + self.second(torch.relu(h))
        return self.last(torch.cat([torch.relu(h), nn.functional.leaky_relu(h, 0.1)], 1))


def network(kind: str) -> nn.Module:
    torch.manual_seed(3)
    if kind == "residual":
        return Residual().double()
    if kind == "convolution":
        layers = nn.Conv2d(1, 1, 2), nn.ReLU(), nn.Flatten(), nn.Linear(2, 3), nn.LeakyReLU(0.2), nn.Linear(3, 2)
        return nn.Sequential(nn.Unflatten(1, (1, 2, 3)), *layers).double()
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).double()


def branching(
    kind: str, rows: Tensor, offsets: Tensor, dtype: torch.dtype = torch.float64
) -> tuple[Branching, Tensor]:
    """And points of its box."""
    model, d = network(kind).to(dtype), 6 if kind == "convolution" else 3
    centre = torch.randn(1, d, generator=torch.Generator().manual_seed(1), dtype=dtype)
    region = Box(Interval.between(centre - 1, centre + 1, Rounding.of(dtype)))
    graph = trace(model, centre)
    root = optimised(graph, region, rows.to(dtype).flatten(0, 1)[None], 3)
    assert root is not None
    noise = torch.rand(4000, d, generator=torch.Generator().manual_seed(2), dtype=dtype)
    return Branching(graph, region, rows.to(dtype), offsets.to(dtype), root), centre - 1 + 2 * noise


def test_bounds_hold_on_their_part_for_all_multipliers_and_slopes() -> None:
    rows = torch.tensor([[[1.0, -1.0], [-0.5, 0.3]], [[0.2, 1.0], [0.2, 1.0]]], dtype=torch.float64)
    offsets = torch.tensor([[0.1, -0.2], [0.0, 0.0]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for kind, dtype in itertools.product(("dense", "residual", "convolution"), (torch.float32, torch.float64)):
        parts, points = branching(kind, rows, offsets, dtype)
        domains = parts.whole()
        for _ in range(3):
            domains = parts.split(domains, parts.choice(domains))
        domains = Domains(
            domains.clause,
            domains.lower,
            torch.rand(domains.weights.shape, generator=generator, dtype=dtype),
            domains.signs,
            {n: torch.rand(t.shape, generator=generator, dtype=dtype) for n, t in domains.slopes.items()},
            {n: torch.rand(t.shape, generator=generator, dtype=dtype) for n, t in domains.multipliers.items()},
        )
        lower = parts.bounds(domains)
        values = computed(parts.graph, {0: points})
        largest = torch.einsum("crk,nk->ncr", parts.rows, values[parts.last]) + parts.offsets
        seen = 0
        for row in range(len(domains)):
            inside = torch.ones(len(points), dtype=torch.bool)
            for source, signs in domains.signs.items():
                inside &= (values[source] * signs[row] >= 0).flatten(1).all(1)
            seen += int(inside.sum())
            assert (largest[inside, domains.clause[row]].amax(1) >= lower[row]).all()
        assert seen == 2 * len(points)  # the parts of each clause are the whole box


def test_steps_never_lower_a_bound_and_halves_are_no_worse_than_the_whole() -> None:
    rows = torch.tensor([[[1.0, -1.0]]], dtype=torch.float64)
    parts, _ = branching("dense", rows, torch.zeros(1, 1, dtype=torch.float64))
    whole = parts.whole()
    better = parts.bounded(whole, 10)
    assert (better.lower >= whole.lower).all()
    halves = parts.bounded(parts.split(better, parts.choice(better)), 10)
    assert (halves.lower >= better.lower.repeat(2)).all()
    assert halves.lower.max() > better.lower.max()


@pytest.mark.parametrize("kind", ["dense", "residual", "convolution"])
def test_where_all_is_split_the_linear_program_finds_the_exact_minimum(kind: str) -> None:
    """Over all parts: the lowest is what the network reaches at the solution, and no sampled point is below it."""
    rows = torch.tensor([[[1.0, -1.0]]], dtype=torch.float64)
    parts, points = branching(kind, rows, torch.full((1, 1), 0.25, dtype=torch.float64))
    queue, found = parts.whole().one_by_one(), []
    while queue:
        domain = queue.pop()
        pick = parts.choice(domain, 1)
        if pick.item() >= 0:
            queue += parts.split(domain, pick).one_by_one()
        elif (solved := parts.leaf(domain)) is not None:
            found.append((solved[0].lower.item(), solved[1]))
        assert len(found) < 300
    lowest, x = min(found, key=lambda pair: pair[0])

    def value(x: Tensor) -> Tensor:
        return computed(parts.graph, {0: x})[parts.last] @ rows[0, 0] + 0.25

    assert value(x).item() == pytest.approx(lowest, abs=1e-6)
    assert (value(points) >= lowest - 1e-12).all()


def test_an_empty_part_is_proved_by_its_linear_program() -> None:
    """Of v and −v both active only where v = 0; with biases, nowhere."""
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model[0].bias.copy_(torch.tensor([-0.1, -0.1]))
        model[2].weight.fill_(1.0)
        model[2].bias.fill_(-5.0)
    x = torch.zeros(1, 1, dtype=torch.float64)
    region, rows = Box(Interval.between(x - 1, x + 1, Rounding.of(x.dtype))), x.new_ones(1, 1, 1)
    graph = trace(model, x)
    root = optimised(graph, region, rows[0][None], 1)
    assert root is not None
    parts = Branching(graph, region, rows, x.new_zeros(1, 1), root)
    both = parts.split(parts.split(parts.whole(), torch.tensor([0])), torch.tensor([0, 1])).take(slice(1))
    both.signs[1][:] = 1
    solved = parts.leaf(both)
    assert solved is not None
    assert solved[0].lower.item() > 0
