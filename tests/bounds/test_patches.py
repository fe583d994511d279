"""CROWN by receptive field: the bounds are those of whole maps, and what is held is what a neuron sees."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from helpers import Largest, images
from torch import Tensor, nn

from holdfast import Threat
from holdfast.bounds import bound_margins, bound_outputs, region_of, trace
from holdfast.bounds.fields import Plan, Window, by_channel, pool_geometry
from holdfast.bounds.interval import Interval
from holdfast.bounds.linear import sweep
from holdfast.bounds.neurons import contested
from holdfast.bounds.operators import Affine, Graph, MaxPool
from holdfast.bounds.patches import Patches
from holdfast.bounds.relaxation import slopes_by
from holdfast.layers import MaxMin


class Block(nn.Module):
    """Branches of several sizes that are added, and set side by side."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.first, self.second = nn.Conv2d(3, 3, 3, stride, 1), nn.Conv2d(3, 3, 3, padding=1)
        self.short = nn.Conv2d(3, 3, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, h: Tensor) -> Tensor:
        out = self.second(torch.relu(self.first(torch.relu(self.norm(h)))))
        return torch.cat([out - self.short(h), torch.relu(out)], 1)


MIDDLES: dict[str, nn.Module] = {
    "convolution": nn.Conv2d(3, 4, 3, padding=1),
    "stride 2": nn.Conv2d(3, 4, 4, 2, 1),
    "stride beyond the kernel": nn.Conv2d(3, 4, (1, 2), (2, 3)),
    "dilated groups": nn.Conv2d(3, 6, 3, dilation=2, padding=1, groups=3),
    "no padding": nn.Conv2d(3, 4, 5),
    "residual": Block(1),
    "strided residual": Block(2),
    "BatchNorm behind": nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)),
    "max pool": nn.MaxPool2d(2),
    "max pool, overlapping": nn.MaxPool2d(3, 2, 1),
    "max pool, up to the ceiling": nn.MaxPool2d(3, 2, ceil_mode=True),
    "average pool": nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 4, 3)),
    "MaxMin": nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), MaxMin(), nn.Conv2d(4, 4, 1)),
    "smooth": nn.Sequential(nn.Tanh(), nn.Conv2d(3, 4, 3, padding=1)),
    "transposed": nn.ConvTranspose2d(3, 4, 3, 2),
}


def network(middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    ends = [nn.Conv2d(1, 3, 3, padding=1), nn.ReLU()], [nn.ReLU(), nn.LazyConv2d(3, 3), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*ends[0], deepcopy(middle), *ends[1], nn.LazyLinear(4))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        model(torch.rand(2, 1, 11, 12))
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model.double().eval()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("middle", MIDDLES.values(), ids=MIDDLES.keys())
def test_bounds_are_those_of_whole_maps(middle: nn.Module, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, threat = network(middle), Threat(norm, {"linf": 0.05, "l2": 0.2, "l1": 0.5}[norm])
    x, y = torch.rand(3, 1, 11, 12).double(), torch.tensor([0, 1, 2])
    found = {
        arithmetic: bound_margins(model, x, y, threat, "crown", arithmetic=arithmetic)
        for arithmetic in (None, "real")
    }
    with monkeypatch.context() as patch:
        patch.setattr(Plan, "_settle", lambda *_: None)
        whole = bound_margins(model, x, y, threat, "crown", arithmetic=None)
    assert torch.allclose(found[None], whole, atol=1e-9)
    assert torch.allclose(found["real"], whole, atol=1e-8)
    assert (found["real"] <= whole).all()


def test_gradients_are_those_of_whole_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, threat = torch.rand(2, 1, 11, 12).double(), torch.tensor([0, 1]), Threat("linf", 0.05)
    gradients = []
    for windows in (True, False):
        model = network(MIDDLES["strided residual"])
        with monkeypatch.context() as patch:
            if not windows:
                patch.setattr(Plan, "_settle", lambda *_: None)
            bound_margins(model, x, y, threat, "crown", arithmetic=None).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-9)


def test_windows_grow_by_kernels_and_move_by_strides() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 4, 2, 1), nn.ReLU())
    x = torch.rand(2, 1, 16, 16)
    graph = trace(nn.Sequential(*model, nn.Flatten(), nn.LazyLinear(2)), x)
    relaxations = sweep(graph, region_of(x, Threat("linf", 0.1)), slopes_by("adaptive")).relaxations
    plan = Plan.of(graph, 3, relaxations, {}, x)
    assert plan.windows[2] == Window((2, 2), (-1, -1), (4, 4))
    assert plan.windows[0] == Window((2, 2), (-2, -2), (6, 6))
    assert plan.width == 6 * 6


def test_a_neuron_of_an_early_layer_holds_no_maps() -> None:
    torch.manual_seed(0)
    size, width = 48, 4
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(width * size**2, 2),
    )
    x, y = torch.rand(1, 3, size, size), torch.tensor([0])
    with torch.no_grad(), Largest() as largest:
        bound_margins(model, x, y, Threat("linf", 0.02), "crown")
    assert largest.entries < 4 * 2**20  # of 10⁸ that a map for each unstable neuron has


def test_what_acts_by_channel_is_told_from_what_does_not() -> None:
    like, factor = torch.zeros(1), torch.tensor([2.0, -3.0])[:, None, None]
    scaled = Affine(lambda x: factor * x + 1, lambda r: factor.abs() * r, entrywise=True)
    found = by_channel(scaled, (2, 3, 4), like)
    assert found is not None
    assert found[0].tolist() == [2, -3]
    assert found[1].tolist() == [1, 1]
    for forward in (
        lambda x: x.flip(3),
        lambda x: x.transpose(2, 3),
        lambda x: x * torch.arange(16.0).view(4, 4),
        lambda x: x + torch.arange(16.0).view(4, 4),
    ):
        assert by_channel(Affine(forward, forward, entrywise=True), (2, 4, 4), like) is None


@pytest.mark.parametrize(
    ("pool", "geometry"),
    [
        (nn.MaxPool2d(2), ((2, 2), (2, 2), (0, 0))),
        (nn.MaxPool2d(3, 2, 1), ((3, 3), (2, 2), (1, 1))),
        (nn.MaxPool2d((2, 3), (1, 2)), ((2, 3), (1, 2), (0, 0))),
        (nn.MaxPool2d(3, 2, ceil_mode=True), ((3, 3), (2, 2), (0, 0))),
        (nn.AdaptiveMaxPool2d((2, 3)), None),
    ],
)
def test_geometry_of_pools(pool: nn.Module, geometry: object) -> None:
    model = nn.Sequential(pool, nn.Flatten(), nn.LazyLinear(2))
    operator = trace(model, torch.rand(2, 1, 7, 8)).nodes[0].operator
    assert isinstance(operator, MaxPool)
    assert pool_geometry(operator, (1, 7, 8), torch.zeros(1)) == geometry


def test_a_pool_asks_of_windows_without_a_lone_winner() -> None:
    lower = torch.tensor([[0.0, 3, 0, 2], [0, 1, 0, 0]]).view(1, 1, 2, 4)
    upper = torch.tensor([[1.0, 4, 1, 3], [2, 2, 2.5, 0]]).view(1, 1, 2, 4)
    operator = trace(nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 2)), lower).nodes[0].operator
    assert isinstance(operator, MaxPool)
    found = contested(operator, Interval.between(lower, upper))
    assert found.view(2, 4).tolist() == [[False, False, False, True], [False, False, True, False]]


def test_an_exact_interval_is_not_asked_for_a_tighter_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = images(2)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 4))
    asked: list[int] = []
    of = Plan.of

    def told(graph: Graph, source: int, *rest: Any) -> Plan:
        asked.append(source)
        return of(graph, source, *rest)

    monkeypatch.setattr(Plan, "of", told)
    bound_margins(model, x, y, Threat("linf", 0.1), "crown")
    assert asked == []
    bound_margins(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), *model), x, y, Threat("linf", 0.1), "crown")
    assert asked == [2, 3]


def test_dense_branches_that_are_added_begin_with_rows_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.first(x))
            return self.third(torch.relu(h - self.second(h)))

    torch.manual_seed(0)
    model, x, y = Dense().double(), torch.rand(4, 6).double(), torch.tensor([0, 1, 2, 0])
    found = bound_margins(model, x, y, Threat("linf", 0.2), "crown", arithmetic=None)
    monkeypatch.setattr(Patches, "_pass_on", lambda *_: None)
    assert torch.allclose(
        bound_margins(model, x, y, Threat("linf", 0.2), "crown", arithmetic=None), found, atol=1e-12
    )


def test_maps_of_two_sizes_do_not_share_a_mask() -> None:
    """Equal windows on a map and on the map without its last row and column."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Conv2d(1, 1, 3, 2, 1, bias=False) for _ in range(2))
            self.last = nn.Linear(16, 2)
            with torch.no_grad():
                self.a.weight.fill_(0.5)
                self.b.weight.fill_(1.0)
                self.last.weight.fill_(1.0)
                self.last.bias.zero_()

        def forward(self, x: Tensor) -> Tensor:
            return self.last((self.a(x[..., :7, :7]) + self.b(x)).relu().flatten(1))

    model, x = Two(), torch.ones(1, 1, 8, 8)
    for intersect in (True, False):
        _, upper = bound_outputs(model, x, (-x, x), method="crown", intersect=intersect)
        assert (upper >= model(x)).all()
        assert (upper <= model(x) * 1.001).all()


def test_a_dilated_convolution_before_a_tightened_value() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=2, dilation=2), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(3 * 144, 2)).double()
    x = torch.rand(2, 1, 12, 12, dtype=torch.float64)
    lower, upper = bound_outputs(model, x, (x - 0.02, x + 0.02), method="crown")
    for _ in range(20):
        z = model(x + 0.04 * (torch.rand_like(x) - 0.5))
        assert ((z >= lower) & (z <= upper)).all()
