"""An affine end is one affine map, however it is written: every bound sees it as the dense layer that it is."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers import images
from torch import Tensor, nn

from holdfast import Threat
from holdfast.analysis.lipschitz import network_constant
from holdfast.bounds import Sum, bound_margins, bound_outputs, region_of, trace
from holdfast.bounds.ball import lipschitz_constant, lipschitz_radii
from holdfast.bounds.gains import certified_gains
from holdfast.bounds.specification import interval_margins
from holdfast.bounds.tail import tail_of
from holdfast.certify import LipschitzCertifier
from holdfast.objectives import BCP, CROWNIBP, IBP, LMT, SABR, STAPS, GloRo, Objective, OneStepRelaxation, Progress

INF = math.inf
LINF = ("ibp", "crown-ibp", "crown", "one-step", "alpha-crown")
L2 = ("ibp", "crown", "bcp", "lmt")


class Ending(nn.Module):
    """A body that ends in a ReLU, a dense layer, and something behind it."""

    def __init__(self, rest: Callable[[Tensor], Tensor] | nn.Module, width: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 16), nn.ReLU())
        self.last, self.rest = nn.Linear(16, width), rest
        for parameter in [*self.body.parameters(), *self.last.parameters()]:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.last(self.body(x)))


def settled(module: nn.Module) -> nn.Module:
    """With parameters and statistics that are not those of the start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return module


CONSTANT = torch.tensor([0.3, -0.2, 1.0, 0.0], dtype=torch.float64)
FACTOR = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
TAILS: dict[str, tuple[Callable[[Tensor], Tensor] | nn.Module, int]] = {
    "identity": (nn.Identity(), 4),
    "dropout": (nn.Dropout(0.5), 4),
    "view": (lambda z: z.view(len(z), 4), 4),
    "flatten": (nn.Flatten(), 4),
    "a map of one pixel, squeezed": (lambda z: z.unsqueeze(2).unsqueeze(3).squeeze(3).squeeze(2), 4),
    "temperature": (lambda z: z / 2.5, 4),
    "negative temperature": (lambda z: z / -2.5, 4),
    "scale": (lambda z: 3.0 * z, 4),
    "a scale for each": (lambda z: z * FACTOR, 4),
    "bias": (lambda z: z + CONSTANT, 4),
    "from a constant": (lambda z: CONSTANT - z, 4),
    "negation": (lambda z: -z, 4),
    "BatchNorm": (settled(nn.BatchNorm1d(4)), 4),
    "two dense layers": (settled(nn.Linear(6, 4)), 6),
    "a dense layer and its end": (nn.Sequential(settled(nn.Linear(6, 4)), settled(nn.BatchNorm1d(4))), 6),
    "some of the outputs": (lambda z: z[:, 1:5], 6),
    "a convolution of one pixel": (
        nn.Sequential(nn.Unflatten(1, (6, 1, 1)), settled(nn.Conv2d(6, 4, 1)), nn.Flatten()),
        6,
    ),
    "a mean over windows": (nn.Sequential(nn.Unflatten(1, (4, 2, 2)), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 16),
    "windows that overlap": (nn.Sequential(nn.Unflatten(1, (1, 6)), nn.AvgPool1d(3, 1), nn.Flatten()), 6),
    "of two at once": (lambda z: torch.cat([z[:, :2], 2 * z[:, 2:]], 1), 4),
    "a residual": (lambda z: z + 0.5 * z, 4),
}  # fmt: skip


def folded(model: Ending) -> Ending:
    """The same network with everything behind the ReLU in one dense layer."""
    with torch.no_grad():
        offset = model.rest(model.last(torch.zeros(1, 16, dtype=torch.float64)))
        columns = model.rest(model.last(torch.eye(16, dtype=torch.float64))) - offset
    other = Ending(nn.Identity()).double()
    other.body.load_state_dict(model.body.state_dict())
    with torch.no_grad():
        other.last.weight.copy_(columns.T)
        other.last.bias.copy_(offset[0])
    return other.eval()


@pytest.fixture(params=list(TAILS))
def pair(request: pytest.FixtureRequest) -> tuple[Ending, Ending]:
    model = Ending(*TAILS[request.param]).double().eval()
    return model, folded(model)


def problem() -> tuple[Tensor, Tensor]:
    x, y = images(6)
    return x.double(), y


def some_points(threat: Threat, x: Tensor, count: int) -> list[Tensor]:
    generators = [[torch.Generator().manual_seed(len(x) * s + i) for i in range(len(x))] for s in range(count)]
    return [threat.random_point(x, each) for each in generators]


def least_margins(logits: Tensor, y: Tensor) -> Tensor:
    """min z_y − z_j over the points of logits (points, N, K), (N, K−1)."""
    margins = logits.gather(2, y.expand(len(logits), -1)[:, :, None]) - logits
    return torch.stack([m[j] for m, j in zip(margins.amin(0), ~torch.eye(4).bool()[y], strict=True)])


def test_every_bound_is_that_of_the_folded_network(pair: tuple[Ending, Ending]) -> None:
    (model, plain), (x, y) = pair, problem()
    for threat, methods in ((Threat("linf", 0.1), LINF), (Threat("l2", 0.4), L2)):
        points = [
            threat.random_point(x, [torch.Generator().manual_seed(9 * s + i) for i in range(6)]) for s in range(40)
        ]
        with torch.no_grad():
            logits = torch.stack([model(point) for point in points])
        for method in methods:
            found, expected = (
                bound_margins(net, x, y, threat, method, iterations=2).detach() for net in (model, plain)
            )
            assert torch.allclose(found, expected, atol=1e-6), method
            assert (found <= least_margins(logits, y) + 1e-9).all(), method
        for method in ("ibp", "crown"):
            low, high = bound_outputs(model, x, threat, method)
            assert (low <= logits + 1e-9).all()
            assert (logits <= high + 1e-9).all()
            for ours, expected in zip((low, high), bound_outputs(plain, x, threat, method), strict=True):
                assert torch.allclose(ours, expected, atol=1e-6)


def test_lipschitz_radii_and_constants_are_those_of_the_folded_network(pair: tuple[Ending, Ending]) -> None:
    (model, plain), (x, _) = pair, problem()
    y = plain(x).argmax(1)
    radii, constants = [], []
    for net in (model, plain):
        graph = trace(net, x)
        gains = certified_gains(graph, x)
        radii.append(lipschitz_radii(graph, x, y, gains))
        constants.append(lipschitz_constant(graph, gains, x))
    assert torch.allclose(radii[0], radii[1], rtol=1e-6)
    assert torch.allclose(constants[0], constants[1], rtol=2e-5)
    assert constants[0] >= constants[1] * (1 - 1e-9)
    certificates = [LipschitzCertifier()(net, x, y, Threat("l2", 0.05)) for net in (model, plain)]
    assert torch.allclose(certificates[0].radius, certificates[1].radius, rtol=1e-6)
    constant = network_constant(model, x, Threat("l2", 0.5))
    assert constant.found <= constant.verified
    assert all(layer.found <= layer.verified * (1 + 1e-9) for layer in constant.layers)


OBJECTIVES: list[Objective] = [
    IBP(kappa=0.0),
    CROWNIBP(beta=0.5),
    CROWNIBP(beta=0.5, fused=True),
    OneStepRelaxation(),
    OneStepRelaxation(fused=True),
    SABR(),
    STAPS(),
    BCP(),
    LMT(),
    GloRo(),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_training_on_bounds_pulls_at_the_weights_as_it_does_without_the_end(objective: Objective) -> None:
    """The end here changes nothing, so that losses and gradients are those of the network without it."""
    x, y = problem()
    threat = Threat("l2" if isinstance(objective, BCP | LMT | GloRo) else "linf", 0.1)
    found = []
    for rest in (nn.Identity(), nn.Sequential(nn.Identity(), nn.Dropout(0.0), nn.Flatten())):
        model = Ending(rest).double()
        loss = objective.loss(model, x, y, threat, Progress.end()).total
        found.append(
            (loss.detach(), torch.autograd.grad(loss, [*model.body.parameters(), *model.last.parameters()]))
        )
    assert torch.allclose(found[0][0], found[1][0], atol=1e-9)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(one, other, atol=1e-9)


def test_the_weights_of_the_end_are_trained_too() -> None:
    """By finite differences, through two dense layers and BatchNorm."""
    x, y = problem()
    model = Ending(nn.Sequential(settled(nn.Linear(6, 4)), settled(nn.BatchNorm1d(4))), 6).double().eval()
    weights = [model.last.weight, *model.rest.parameters()]

    def loss() -> Tensor:
        return IBP(kappa=0.0).loss(model, x, y, Threat("linf", 0.1), Progress.end()).total

    gradients = torch.autograd.grad(loss(), weights)
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(weight.shape, generator=generator).double() for weight in weights]
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True)).item()
    values = []
    for sign in (1, -2):
        with torch.no_grad():
            for weight, d in zip(weights, direction, strict=True):
                weight += sign * 1e-6 * d
        values.append(loss().item())
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-4)


class TwoHeads(nn.Module):
    """Features of two bodies, a dense layer on each, averaged."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = Ending(nn.Identity()), Ending(nn.Identity())
            nn.init.normal_(self.second.last.weight)

    def forward(self, x: Tensor) -> Tensor:
        return (self.first(x) + self.second(x)) / 2


def test_heads_that_are_averaged_are_one_dense_layer_on_their_features_side_by_side() -> None:
    model, (x, y) = TwoHeads().double().eval(), problem()

    class SideBySide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads, self.last = model, nn.Linear(32, 4).double()
            with torch.no_grad():
                self.last.weight.copy_(torch.cat([model.first.last.weight, model.second.last.weight], 1) / 2)
                self.last.bias.copy_((model.first.last.bias + model.second.last.bias) / 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cat([self.heads.first.body(x), self.heads.second.body(x)], 1))

    for threat, methods in ((Threat("linf", 0.1), LINF), (Threat("l2", 0.4), L2)):
        for method in methods:
            found, expected = (bound_margins(net, x, y, threat, method).detach() for net in (model, SideBySide()))
            assert torch.allclose(found, expected, atol=1e-6), method


def test_a_linear_network_in_a_ball_has_its_closed_form() -> None:
    """z_y − z_j − eps ‖W_y − W_j‖, in l_2 and l_1 as in l_inf, also where the weights are in two layers."""
    model, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Linear(16, 4)).double(), problem()
    weight = (model[2].weight @ model[1].weight).detach()
    others = torch.stack([torch.tensor([j for j in range(4) if j != label]) for label in y.tolist()])
    logits = model(x).detach()
    margins = logits.gather(1, y[:, None]) - logits.gather(1, others)
    rows = weight[y][:, None] - weight[others]
    for norm, dual in (("linf", 1.0), ("l2", 2.0), ("l1", INF)):
        threat = Threat(norm, 0.3, -INF, INF)
        expected = margins - 0.3 * torch.linalg.vector_norm(rows, dual, dim=2)
        assert torch.allclose(bound_margins(model, x, y, threat, "ibp"), expected, atol=1e-9)
        if norm == "l2":
            for method in ("bcp", "lmt"):
                assert torch.allclose(bound_margins(model, x, y, threat, method), expected, atol=1e-9)


def test_what_only_gathers_entries_stays_outside() -> None:
    """Pooling over windows apart in front of a dense layer costs no coefficient for each of its entries."""
    x = torch.rand(2, 1, 8, 8)

    def sources(*layers: nn.Module) -> list[tuple[int, ...]]:
        graph = trace(nn.Sequential(nn.Conv2d(1, 3, 3, 1, 1), nn.ReLU(), *layers), x)
        return [graph.shape(source) for source in tail_of(graph, x).sources]

    assert sources(nn.Flatten(), nn.Linear(192, 4)) == [(192,)]
    assert sources(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(12, 4)) == [(12,)]
    assert sources(nn.AvgPool2d(4, 2), nn.Flatten(), nn.Linear(27, 4)) == [(3, 8, 8)]
    assert sources(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 4)) == [(3, 8, 8)]
    assert sources(nn.Flatten()) == [(192,)]


def test_a_value_that_is_read_on_both_sides_of_the_end() -> None:
    """h feeds the logits directly and through a ReLU: h itself is part of the end, what it comes from is not."""

    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x.flatten(1))
            return h - self.second(torch.relu(h)) / 2

    torch.manual_seed(0)
    model, (x, y) = Skipping().double(), problem()
    graph, threat = trace(model, x), Threat("linf", 0.1)
    assert any(isinstance(node.operator, Sum) for node in graph.nodes)
    assert len(tail_of(graph, x).sources) == 2
    found = interval_margins(graph, region_of(x, threat), y).lower
    logits = torch.stack([model(point) for point in some_points(threat, x, 200)])
    assert (found <= least_margins(logits, y) + 1e-9).all()


def test_intervals_need_no_gradients_of_their_own() -> None:
    x, y = images(3)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AvgPool2d(3, 1), nn.Flatten(), nn.Linear(32, 4))
    for ended in (model, nn.Sequential(model, nn.BatchNorm1d(4)).eval()):
        with torch.inference_mode():
            found = bound_margins(ended, x.clone(), y, Threat("linf", 0.1), "ibp")
        assert torch.equal(found, bound_margins(ended, x, y, Threat("linf", 0.1), "ibp"))
