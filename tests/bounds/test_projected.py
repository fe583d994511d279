"""Random projections: what they estimate, and how closely."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import images
from torch import Tensor, nn

from holdfast import Threat
from holdfast.bounds import UnsupportedOperator, region_of, trace
from holdfast.bounds.linear import sweep
from holdfast.bounds.projected import projected_intervals
from holdfast.bounds.relaxation import slopes_by
from holdfast.draws import Draws
from holdfast.objectives import CAP, Progress

ONE = Draws.of(3, [0])


class Residual(nn.Module):
    """Two branches of which one is subtracted, and both side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Linear(8 * 64, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        inner = hidden - self.second(hidden).relu()
        return self.last(torch.cat([inner, hidden], 1).relu().flatten(1))


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "residual":
        return Residual().double().eval()
    layers = [nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 4)]
    return nn.Sequential(*layers).double().eval()


@pytest.mark.parametrize("threat", [Threat("linf", 0.05), Threat("l2", 0.4)], ids=lambda t: t.norm)
@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_many_projections_come_near_the_polytope_s_widths(kind: str, threat: Threat) -> None:
    model, x = network(kind), images(6)[0].double()
    graph, region = trace(model, x), region_of(x, Threat(threat.norm, threat.eps, -math.inf, math.inf))
    exact = sweep(graph, region, slopes_by("same-slope"), tighten=True, intersect=False).values
    found = projected_intervals(graph, region, 4000, ONE)
    read = [node.inputs[0] for node in graph.nodes if type(node.operator).__name__ == "Rectifier"]
    assert len(read) >= 2
    for value in read:
        radius = exact[value].radius
        told = radius > 0.1 * radius.mean()  # a ReLU that hardly changes its sign may be stable for one of the two
        ratio = (found[value].radius / radius)[told]
        assert ratio.mean().item() == pytest.approx(1, abs=0.05)
        assert ratio.quantile(0.95) < 1.15
        assert ratio.quantile(0.05) > 0.85


def test_few_projections_train_like_the_exact_polytope() -> None:
    model, (x, y) = network("plain"), images(24)
    threat, end = Threat("linf", 0.03), Progress(9, 10, seed=4)
    x = x.double()
    exact = CAP().loss(model, x, y, threat, end).total
    estimated = CAP(projections=200).loss(model, x, y, threat, end).total
    assert estimated.item() == pytest.approx(exact.item(), rel=0.05)
    first, second = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        for loss in (exact, estimated)
    )
    assert torch.cosine_similarity(first, second, dim=0) > 0.95
    again = CAP(projections=200).loss(model, x, y, threat, end).total
    assert again.item() == estimated.item()
    other = CAP(projections=200).loss(model, x, y, threat, Progress(8, 10, seed=4)).total
    assert other.item() != estimated.item()


def test_what_has_no_polytope_is_refused() -> None:
    x = images(2)[0]
    graph = trace(nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Sigmoid(), nn.Linear(5, 4)), x)
    with pytest.raises(UnsupportedOperator, match="random projections"):
        projected_intervals(graph, region_of(x, Threat("linf", 0.1)), 3, ONE)
    plain = trace(network("plain").float(), x)
    with pytest.raises(UnsupportedOperator, match="balls in l_2"):
        projected_intervals(plain, region_of(x, Threat("l1", 0.1, -9, 9)), 3, ONE)
