"""Complete verification: every verdict is true, small networks are decided, and the clock is kept."""

from __future__ import annotations

import copy
import itertools
import time

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from holdfast import Threat
from holdfast.certify import BoundCertifier, BranchAndBoundCertifier, Certificate, verify


def absolute(bias: float = 0.0) -> nn.Module:
    """|x| + bias."""
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model[0].bias.zero_()
        model[2].weight.fill_(1.0)
        model[2].bias.fill_(bias)
    return model


def small(seed: int, inputs: int = 3, width: int = 6, classes: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)
    return nn.Sequential(*layers)


def exact_minimum(model: nn.Module, lower: Tensor, upper: Tensor, row: Tensor) -> float:
    """Of ⟨row, logits⟩ of a dense network with two hidden layers on a box: a linear program per activation pattern
    of which at least a sampled neighbourhood or the program itself says that it exists."""
    first, second, last = (
        (layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy())
        for layer in (model[0], model[2], model[4])
    )
    sides = list(zip(lower[0].tolist(), upper[0].tolist(), strict=True))
    best, width = np.inf, len(first[1])
    for outer in itertools.product((0.0, 1.0), repeat=width):
        on = np.array(outer)
        sign = 2 * on - 1
        if linprog(np.zeros(len(sides)), -sign[:, None] * first[0], sign * first[1], bounds=sides).status != 0:
            continue
        inner_w, inner_b = second[0] @ (on[:, None] * first[0]), second[0] @ (on * first[1]) + second[1]
        for inner in itertools.product((0.0, 1.0), repeat=width):
            also = np.array(inner)
            signs = np.concatenate([sign, 2 * also - 1])
            function = row.numpy() @ (last[0] @ (also[:, None] * inner_w))
            constant = row.numpy() @ (last[0] @ (also * inner_b) + last[1])
            held, ends = np.concatenate([first[0], inner_w]), np.concatenate([first[1], inner_b])
            found = linprog(function, -signs[:, None] * held, signs * ends, bounds=sides)
            if found.status == 0:
                best = min(best, found.fun + constant)
    return float(best)


def box(seed: int, inputs: int = 3, radius: float = 1.0) -> tuple[Tensor, Tensor]:
    centre = torch.randn(1, inputs, generator=torch.Generator().manual_seed(seed))
    return centre - radius, centre + radius


@pytest.mark.parametrize(
    ("row", "offset", "verdict"),
    [(1.0, 0.01, "proved"), (1.0, -0.01, "refuted"), (-1.0, 1.01, "proved"), (-1.0, 0.99, "refuted")],
)
def test_an_absolute_value_on_its_box(row: float, offset: float, verdict: str) -> None:
    ends = torch.tensor([[-1.0]]), torch.tensor([[1.0]])
    found = verify(absolute(), *ends, torch.tensor([[row]]), torch.tensor([offset]))
    assert found.verdict == verdict
    assert (found.bound > 0) == (verdict == "proved")
    assert (found.counterexample is None) == (verdict == "proved")


def test_what_lies_within_rounding_is_not_claimed() -> None:
    """|x| > 0 fails at a single point, |x| + 2⁻⁶⁰ > 0 holds by less than a double can tell from 1."""
    ends = torch.tensor([[-1.0]]), torch.tensor([[0.7]])
    for offset in (0.0, 2.0**-60):
        found = verify(absolute(1.0), *ends, torch.ones(1, 1), torch.tensor([offset - 1], dtype=torch.float64))
        assert found.verdict != "proved"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_verdict_turns_where_the_exact_minimum_is(seed: int) -> None:
    model, ends = small(seed, width=4), box(seed)
    row = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
    minimum = exact_minimum(model, *ends, row)
    for gap in (1e-4, 1e-1):
        above = verify(model, *ends, row[None], torch.tensor([gap - minimum], dtype=torch.float64))
        below = verify(model, *ends, row[None], torch.tensor([-gap - minimum], dtype=torch.float64))
        assert above.verdict == "proved"
        assert 0 < above.bound <= gap + 1e-6
        assert below.verdict == "refuted"
        assert below.counterexample is not None
        assert (ends[0] <= below.counterexample).all()
        assert (below.counterexample <= ends[1]).all()
        assert (model.double()(below.counterexample) @ row).item() - gap - minimum < 0
        model.float()


def test_clauses_are_a_conjunction_of_disjunctions() -> None:
    """On [−1, 1]: x > −0.1 or −x > −0.1 everywhere, though neither alone; and with x < 0.5 no more."""
    model, ends = nn.Linear(1, 1), (torch.tensor([[-1.0]]), torch.tensor([[1.0]]))
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.zero_()
    either = torch.tensor([[1.0], [-1.0]]), torch.tensor([0.1, 0.1])
    assert verify(model, *ends, [either[0]], [either[1]]).verdict == "proved"
    assert verify(model, *ends, *either).verdict == "refuted"  # a tensor: both at once
    both = verify(model, *ends, [either[0], -torch.ones(1, 1)], [either[1], torch.tensor([0.5])])
    assert both.verdict == "refuted"
    assert both.counterexample is not None
    assert both.counterexample.item() >= 0.5


def test_disjunctions_of_curved_networks_need_parts_and_weights() -> None:
    model, ends = small(5), box(5)
    points = ends[0] + torch.rand(20000, 3, generator=torch.Generator().manual_seed(0)) * (ends[1] - ends[0])
    rows = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 0.5, 0.5]])
    lowest = (model(points) @ rows.T).amax(1).min().item()
    found = verify(model, *ends, [rows], [torch.full((2,), 0.05 - lowest)], seconds=60)
    assert found.verdict == "proved"
    found = verify(model, *ends, [rows], [torch.full((2,), -0.05 - lowest)], seconds=60)
    assert found.verdict == "refuted"


def test_without_time_nothing_is_decided() -> None:
    model, ends = small(4, inputs=20, width=60), box(4, inputs=20)
    points = ends[0] + torch.rand(5000, 20) * (ends[1] - ends[0])
    row = torch.tensor([[1.0, -1.0, 0.0]])
    started = time.perf_counter()
    found = verify(model, *ends, row, 1.0 - (model(points) @ row.T).amin()[None].detach(), seconds=0.01)
    assert found.verdict in ("undecided", "refuted")  # an attack comes first
    assert time.perf_counter() - started < 30


def test_bad_questions_are_refused() -> None:
    model, ends = small(0), box(0)
    with pytest.raises(ValueError, match="entries do not fit"):
        verify(model, *ends, torch.ones(1, 2), torch.zeros(1))
    with pytest.raises(ValueError, match="rows"):
        verify(model, *ends, [torch.ones(1, 3)], [torch.zeros(2)])
    with pytest.raises(ValueError, match="lower ≤ upper"):
        verify(model, ends[1], ends[0], torch.ones(1, 3), torch.zeros(1))
    with pytest.raises(ValueError, match="softmax"):
        verify(nn.Sequential(model, nn.Softmax(1)), *ends, torch.ones(1, 3), torch.zeros(1))
    with pytest.raises(ValueError, match="arithmetic real"):
        BranchAndBoundCertifier(arithmetic="float32")(model, ends[0], [0], Threat("linf", 0.1, -9, 9))


def convolutional() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 10), nn.ReLU(), nn.Linear(10, 3)
    )


@pytest.mark.parametrize("threat", [Threat("linf", 0.06), Threat("l2", 0.35)], ids=str)
def test_a_certifier_decides_what_cheap_bounds_leave_open(threat: Threat) -> None:
    model, left = convolutional(), []
    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    y[5] = (y[5] + 1) % 3
    cheap = BoundCertifier(method="cascade")(model, x, y, threat)
    found = BranchAndBoundCertifier(seconds=5)(
        model, x, y, threat, on_progress=lambda examples, samples: left.append(examples)
    )
    assert found.verified[cheap.verified].all()
    assert found.status[5] == "wrong"
    assert "refuted" in found.status
    assert left == list(range(left[0], -1, -1))
    assert cheap.status.count("undecided") <= left[0] < 6
    if threat.is_box:
        assert "undecided" not in found.status
    assert found.counterexample is not None
    assert found.margin is not None
    for row, status in enumerate(found.status):
        x_adv = found.counterexample[row : row + 1]
        assert x_adv.isnan().any() == (status != "refuted")
        if status == "refuted":
            assert model(x_adv).argmax().item() != y[row].item()
            assert threat.distance(x[row : row + 1].double(), x_adv.double()).item() <= threat.eps
            assert ((x_adv >= 0) & (x_adv <= 1)).all()
            assert found.method is not None
            assert found.method[row] in ("attack", "branch-and-bound")
        if status == "verified":
            assert found.margin[row] > 0
            assert found.radius[row] == threat.eps


def test_at_the_edge_what_is_verified_has_no_counterexample() -> None:
    """eps bisected to where the verdict turns: below it no attack in float64 succeeds, above it there is one."""
    model = small(7, inputs=4, width=8)
    x = torch.rand(1, 4, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(1)
    low, high = 0.0, 1.0
    for _ in range(14):
        eps = (low + high) / 2
        found = BranchAndBoundCertifier(seconds=20)(model, x, y, Threat("linf", eps, -2, 3))
        assert found.status[0] in ("verified", "refuted")
        low, high = (eps, high) if found.verified.item() else (low, eps)
    noise = 2 * torch.rand(20000, 4, generator=torch.Generator().manual_seed(0)) - 1
    near = x.double() + low * torch.cat([noise, noise.sign()]).double()
    assert (model.double()(near).argmax(1) == y).all()
    assert high - low < 1e-4


def test_what_is_finished_is_told_at_once_and_whatever_is_raised_then_ends_the_work() -> None:
    model, x = convolutional(), torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    y, threat, told = model(x).argmax(1), Threat("linf", 0.06), []
    y[5] = (y[5] + 1) % 3

    def cut(places: Tensor, found: Certificate) -> None:
        told.append((places, found))
        if len(told) == 2:
            raise KeyboardInterrupt

    certifier = BranchAndBoundCertifier(seconds=20)
    whole = certifier(model, x, y, threat, on_found=lambda places, found: told.append((places, found)))
    order = torch.cat([places for places, _ in told])
    assert sorted(order.tolist()) == list(range(6))
    assert len(told) > 2
    assert all(len(places) == 1 for places, _ in told[1:])  # what cheap bounds leave open, one by one
    assert [whole.status[row] for row in order] == [word for _, found in told for word in found.status]
    told.clear()
    model.train()
    with pytest.raises(KeyboardInterrupt):
        certifier(model, x, y, threat, on_found=cut)
    assert model.training


class Curved(nn.Module):
    """Nodes that no split of ReLUs makes exact."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(2)
        activation = {"tanh": nn.Tanh(), "gelu": nn.GELU(), "relu and sigmoid": nn.ReLU()}[kind]
        self.first, self.last = nn.Sequential(nn.Linear(2, 6), activation, nn.Linear(6, 6)), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(torch.sigmoid(self.first(x)))
        return found


@pytest.mark.parametrize("kind", ["tanh", "gelu", "relu and sigmoid"])
def test_what_no_relu_decides_is_decided_by_boxes_of_inputs(kind: str) -> None:
    model, ends = Curved(kind), (-2 * torch.ones(1, 2), 2 * torch.ones(1, 2))
    row = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    axis = torch.linspace(-2, 2, 401, dtype=torch.float64)
    with torch.no_grad():
        values = copy.deepcopy(model).double()(torch.cartesian_prod(axis, axis)) @ row[0]
    lowest = values.min().item()
    above = verify(model, *ends, row, torch.tensor([1e-3 - lowest], dtype=torch.float64), seconds=30)
    below = verify(model, *ends, row, torch.tensor([-1e-3 - lowest], dtype=torch.float64), seconds=30)
    assert above.verdict == "proved"
    assert 0 < above.bound <= 1e-3 + 1e-9
    assert above.domains > 0
    assert below.verdict == "refuted"
    touching = verify(model, *ends, row, torch.tensor([-lowest], dtype=torch.float64), seconds=1)
    assert touching.verdict != "proved" or touching.bound <= 1e-4


class Overflowing(nn.Module):
    """1e300 − exp(1000 x₀), behind a ReLU or not."""

    def __init__(self, inputs: int, relu: bool) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, 1, bias=False).double()
        self.relu = relu
        with torch.no_grad():
            self.first.weight.zero_()
            self.first.weight[0, 0] = 1000.0

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        return 1e300 - (z.relu() if self.relu else z).exp()


@pytest.mark.parametrize(("inputs", "relu"), [(1, False), (1, True), (40, True)])
def test_what_overflows_is_never_proved(inputs: int, relu: bool) -> None:
    box = torch.ones(1, inputs, dtype=torch.float64)
    found = verify(Overflowing(inputs, relu), -box, box, torch.ones(1, 1), torch.zeros(1), seconds=5)
    assert found.verdict != "proved"
    assert not found.bound > 0


@pytest.mark.parametrize("kind", [nn.Sigmoid, nn.ReLU])
def test_a_weight_that_is_nan_is_never_proved(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), kind(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    box = torch.ones(1, 2)
    found = verify(model, -box, box, torch.tensor([[1.0, -1.0]]), torch.tensor([9.0]), seconds=5)
    assert found.verdict == "undecided"


def test_a_norm_keeps_its_eps_in_float64() -> None:
    """None is the eps of the inputs' precision: in float64 another network, which says nothing of this one."""
    model = nn.Sequential(nn.RMSNorm(1, elementwise_affine=False), nn.Linear(1, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0], [0.0]]))
        model[1].bias.copy_(torch.tensor([-0.2, 0.0]))
    x, y, threat = torch.tensor([[5.1e-4]]), torch.tensor([0]), Threat("linf", 4.95e-4)
    assert model(torch.tensor([[2e-5]]))[0, 0] < 0  # in the set, and wrong
    for certifier in (BranchAndBoundCertifier(seconds=2), BoundCertifier(method="crown", float64="always")):
        assert certifier(model, x, y, threat).status[0] != "verified"
    low, high = torch.full((1, 1), 2e-5), torch.full((1, 1), 4e-5)
    assert verify(model, low, high, torch.tensor([[1.0, -1.0]]), torch.zeros(1), seconds=2).verdict != "proved"
