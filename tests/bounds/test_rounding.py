"""What rounding may add is taken from every bound: against exact rational arithmetic, and at the edges of
float32."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from holdfast import Threat
from holdfast.bounds import METHODS, bound_margins, bound_outputs, region_of, trace
from holdfast.bounds.interval import Interval, image, rule
from holdfast.bounds.operators import Linear, Monotone, Operator
from holdfast.bounds.rounding import Bound, Rounding
from holdfast.bounds.rules import RELU
from holdfast.certify import BoundCertifier, LipschitzCertifier

SINGLE, DOUBLE = Rounding.of(torch.float32), Rounding.of(torch.float64)


def swamped(bias: float = 2.0**24) -> nn.Module:
    """z_0 − z_1 = 1 − x for x ≥ 0, by way of a bias in whose roundings x vanishes: class 0 below x = 1."""
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)).eval()
    with torch.no_grad():
        for layer, weight, constant in (
            (model[0], [[1.0]], [0.0]),
            (model[2], [[1.0]], [bias]),
            (model[4], [[-1.0], [0.0]], [bias, -1.0]),
        ):
            layer.weight.copy_(torch.tensor(weight))
            layer.bias.copy_(torch.tensor(constant))
    return model


def exactly(values: Tensor) -> list[Fraction]:
    return [Fraction(value) for value in values.double().flatten().tolist()]


def test_the_shares_of_higham() -> None:
    u = 2.0**-24
    assert SINGLE.gamma(10) == 10 * u / (1 - 10 * u)
    assert DOUBLE.gamma(10) == pytest.approx(10 * 2.0**-53)
    assert SINGLE.gamma(2**22) == math.inf
    assert Rounding.of(torch.float64, "float32").unit == 2.0**-53 + 2.0**-24


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(-30, 30), st.sampled_from([torch.float32, torch.float64]))
def test_the_interval_of_a_dense_layer_holds_its_exact_values(seed: int, power: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, constant, centre, radius = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((3, 5), (3,), (1, 5), (1, 5))
    )
    constant, radius = constant * 2.0**power, radius.abs() * 2.0**-20
    found = image(Linear(weight, constant), Interval(centre, radius, Rounding.of(dtype)))
    for row, low, high in zip(weight, exactly(found.lower), exactly(found.upper), strict=True):
        index = int((weight == row).all(1).nonzero()[0])
        terms = zip(exactly(row), exactly(centre), exactly(radius), strict=True)
        least, most = Fraction(0), Fraction(0)
        for w, c, r in terms:
            least, most = least + w * c - abs(w) * r, most + w * c + abs(w) * r
        offset = exactly(constant)[index]
        assert low <= least + offset <= most + offset <= high


def test_ends_keep_what_is_known_of_them() -> None:
    """A ReLU's interval ends at 0, not at what is left of it in centre and radius."""
    value = Interval.between(torch.tensor([[-3.0, 0.1]]), torch.tensor([[-1.0, 0.3]]), SINGLE)
    relu = image(RELU, value)
    assert relu.lower[0, 0] == relu.upper[0, 0] == 0
    assert (relu.centre - relu.radius <= relu.lower).all()
    assert (relu.take(torch.tensor([0])).lower == relu.lower).all()


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("bcp", "lmt")])
@pytest.mark.parametrize("bias", [2.0**24, 2.0**53])
def test_a_bias_that_swallows_the_input(method: str, bias: float) -> None:
    model, dtype = swamped(bias), torch.float32 if bias == 2.0**24 else torch.float64
    model, x, y = model.to(dtype), torch.tensor([[0.95]], dtype=dtype), torch.tensor([0])
    threat = Threat("linf", 0.15, 0.0, 2.0)
    assert bound_margins(model, x, y, threat, method=method, arithmetic=None).item() >= 0.99  # it falls to −0.1
    assert bound_margins(model, x, y, threat, method=method).item() <= -0.1
    certificate = BoundCertifier(method=method, radius_search="always")(model, x, y, threat)
    assert certificate.status == ["undecided"]
    assert certificate.radius.item() <= 0.05


@pytest.mark.parametrize("method", ["bcp", "lmt"])
def test_balls_around_a_centre_that_is_rounded_away(method: str) -> None:
    x, y, threat = torch.tensor([[0.95]]), torch.tensor([0]), Threat("l2", 0.15, 0.0, 2.0)
    assert bound_margins(swamped(), x, y, threat, method=method).item() <= -0.1
    assert LipschitzCertifier()(swamped(), x, y, threat).radius.item() <= 0.05


def test_float64_decides_what_float32_cannot() -> None:
    x, y, threat = torch.tensor([[0.95]]), torch.tensor([0]), Threat("linf", 0.04, 0.0, 2.0)
    decided = [
        BoundCertifier(method="crown", float64=when)(swamped(), x, y, threat).status[0]
        for when in ("never", "undecided", "always")
    ]
    assert decided == ["undecided", "verified", "verified"]
    # float32 computes 1 for z_0 − z_1 wherever x is, so that a network in float32 has no such margin to show.
    assert BoundCertifier(method="crown", arithmetic="float32")(swamped(), x, y, threat).status == ["undecided"]


def test_the_closed_ball_of_the_eps_that_is_given() -> None:
    """float32 has no 0.1: the nearest is larger, and that to 0.3 − 2^-30 smaller than what is meant."""
    for eps in (0.1, 0.3 - 2.0**-30, 8 / 255, 1e-12):
        x = torch.tensor([[0.5, 0.7, 0.0, 1.0]])
        for norm in ("linf", "l2", "l1"):
            region = region_of(x, Threat(norm, eps), rounding=SINGLE)
            for low, high, value in zip(
                exactly(region.box.lower), exactly(region.box.upper), exactly(x), strict=True
            ):
                assert low <= max(value - Fraction(eps), 0)
                assert high >= min(value + Fraction(eps), 1)


def test_what_is_certified_in_float32_is_what_torch_answers() -> None:
    """A margin of a few roundings: real arithmetic certifies it, torch's float32 answers otherwise in places."""
    model = nn.Sequential(nn.Linear(3, 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]))
        model[0].bias.copy_(torch.tensor([2.0**-30, 0.0]))
    x, y, threat = torch.tensor([[0.3, 0.6, 0.9]]), torch.tensor([0]), Threat("linf", 0.01)
    logits = model(x)
    assert logits[0, 0] == logits[0, 1]  # a tie, which argmax gives to the first
    real, single = (BoundCertifier(arithmetic=a)(model, x, y, threat) for a in ("real", "float32"))
    assert (real.status, real.arithmetic) == (["verified"], "real")
    assert (single.status, single.arithmetic) == (["undecided"], "float32")


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown", "alpha-crown"])
def test_the_slack_is_small_where_nothing_cancels(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.Sigmoid(), nn.Linear(30, 4)).eval()
    x = torch.rand(6, 20)
    y, threat = model(x).argmax(1), Threat("linf", 0.02)
    plain = bound_margins(model, x, y, threat, method=method, arithmetic=None)
    sound = bound_margins(model, x, y, threat, method=method)
    exact = bound_margins(model.double(), x.double(), y, threat, method=method)
    assert (sound <= exact).all()
    assert (plain - sound).max() < 2e-4
    assert torch.allclose(plain.double(), exact, atol=1e-5)


def test_losses_are_bounded_without_slack() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.rand(2, 4)
    region = region_of(x, Threat("linf", 0.1))
    assert region.rounding is None
    assert region_of(x, Threat("l2", 0.1), rounding=SINGLE).plain().rounding is None
    value = rule(trace(model, x).nodes[0].operator, region.box)
    assert value.rounding is None
    assert torch.equal(value.lower, value.centre - value.radius)


def test_an_interval_rule_that_forgets_rounding_is_refused() -> None:
    class Odd(Operator):
        pass

    @rule.register
    def _(operator: Odd, value: Interval) -> Interval:
        return Interval(value.centre, value.radius)

    with pytest.raises(ValueError, match="Odd does not account for rounding"):
        image(Odd(), Interval.point(torch.zeros(1, 2), SINGLE))


def test_a_kernel_of_many_entries_may_err_by_all_of_them() -> None:
    value = Interval.between(torch.zeros(1, 100), torch.full((1, 100), 2.0), SINGLE)
    sums = image(Monotone(lambda x: x.cumsum(1)), value)
    assert sums.upper[0, -1] > 200 * (1 + 100 * 2.0**-24)


def test_what_more_precision_may_reach() -> None:
    bound = Bound(torch.tensor([-0.5, -3.0]), torch.tensor([0.1, 0.1]))
    assert ((bound.hope > 0) == torch.tensor([True, False])).all()
    assert Bound(torch.tensor([1.0])).hope == 1


def test_boxes_without_an_end_are_refused() -> None:
    model, x = nn.Linear(2, 2), torch.zeros(1, 2)
    with pytest.raises(ValueError, match="finite sides"):
        bound_outputs(model, x, (x - math.inf, x + 1))
    with pytest.raises(ValueError, match="'reals' is no arithmetic"):
        bound_outputs(model, x, Threat("linf", 0.1, -1.0), arithmetic="reals")  # type: ignore[arg-type]


def linear(weight: list[list[float]], constant: list[float]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.copy_(torch.tensor(constant))
    return layer


@pytest.mark.parametrize("method", ["crown-ibp", "crown", "ibp"])
def test_what_torch_sums_over_many_inputs_counts_in_float32(method: str) -> None:
    """4,096 small terms, each of which a large one swallows in some orders of summation: torch's answer hangs on
    the size of the batch."""
    ulp = 2.0**-23
    weight = torch.full((2, 4096), ulp / 2) + torch.tensor([[2.0**-8], [-(2.0**-8)]]) * ulp
    weight[:, :16] = 1
    model = nn.Sequential(nn.ReLU(), nn.Linear(4096, 2)).eval()
    with torch.no_grad():
        model[1].weight.copy_(weight)
        model[1].bias.copy_(torch.tensor([0.0, 31 * ulp]))
    x, y, threat = torch.ones(1, 4096), torch.tensor([0]), Threat("linf", 1e-12, 0.0, 2.0)
    real = (weight[0].double() - weight[1].double()).sum().item() - 31 * ulp
    assert 0 < real < 4096 * 4096 * 2.0**-24
    said = {
        a: BoundCertifier(method=method, arithmetic=a)(model, x, y, threat).status[0] for a in ("real", "float32")
    }
    assert said == {"real": "verified", "float32": "undecided"}


class ManySums(nn.Module):
    """z_y alone is 1 and what 400 additions of less than half a rounding make of it."""

    def forward(self, x: Tensor) -> Tensor:
        z, small, last = torch.relu(x[:, :2]), torch.relu(x[:, 2:4]), torch.relu(x[:, 4:])
        for _ in range(400):
            z = z + small
        return z + last


@pytest.mark.parametrize("method", ["ibp", "crown", "bcp", "lmt"])
def test_an_end_of_many_sums(method: str) -> None:
    unit = 2.0**-24
    x = torch.tensor([[0.0, 1.0, 0.0, unit * (1 - 2.0**-10), 1 + 200 * unit, 0.0]])
    y, threat = torch.tensor([0]), Threat("l2", 1e-30, -2.0, 2.0)
    assert ManySums()(x).argmax().item() == 0  # the sum of what is small is lost
    assert BoundCertifier(method=method)(ManySums(), x, y, threat).status == ["undecided"]
    assert LipschitzCertifier()(ManySums(), x, y, threat).status == ["undecided"]


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown", "bcp", "lmt"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_numbers_whose_squares_underflow(method: str, norm: str) -> None:
    """Class 0 where x_0 + x_1 < 1, written with weights of 1e-25 and 1e25."""
    model = nn.Sequential(linear([[1e-25, 1e-25]], [0.0]), nn.ReLU(), linear([[-1e25], [0.0]], [1.0, 0.0])).eval()
    x, y = torch.tensor([[0.25, 0.25]]), torch.tensor([0])
    true = {"linf": 0.25, "l2": math.sqrt(0.125), "l1": 0.5}[norm]
    certificate = BoundCertifier(method=method, radius_search="always")(
        model, x, y, Threat(norm, 1.1 * true, -4.0, 4.0)
    )
    assert certificate.status == ["undecided"]
    assert certificate.radius.item() <= true
    tiny = nn.Sequential(linear([[1e-3, -1e23], [0.0, 0.0]], [0.5, 0.0])).eval()
    at_edge = BoundCertifier(method=method)(tiny, torch.tensor([[0.5, 0.0]]), y, Threat(norm, 2e-23, -1.0, 1.0))
    assert at_edge.status == ["undecided"]  # its margin of 0.5 is gone 5e-24 away


@pytest.mark.parametrize("method", ["ibp", "crown", "lmt"])
def test_softplus_is_that_of_real_numbers(method: str) -> None:
    """torch's is x from 20 on, 2e-9 below log(1 + exp(x)): more than float64 rounds."""
    model = nn.Sequential(nn.Softplus(), linear([[-1.0], [0.0]], [20.0 + 1e-9, 0.0])).double().eval()
    with torch.no_grad():
        model[1].bias[0] = 20.0 + 1e-9  # above torch's value at 20, below the real one
    x, y = torch.tensor([[20.0 + 1e-12]], dtype=torch.float64), torch.tensor([0])
    assert model(x).argmax().item() == 0
    assert BoundCertifier(method=method)(model, x, y, Threat("l2", 1e-14, 0.0, 40.0)).status == ["undecided"]


def test_whole_boxes_are_covered_whole() -> None:
    model = nn.Sequential(linear([[1.0], [0.0]], [0.0, -(2.0**-61)])).eval()
    x, y = torch.ones(1, 1), torch.tensor([0])
    threat = Threat("linf", 0.5, -(2.0**-60), 1.0)  # the width of which rounds to 1
    assert BoundCertifier(float64="always")(model, x, y, threat).radius.isfinite().all()
    assert threat.covering_eps(1) > 1


def test_a_constant_that_broadcasts_is_no_entrywise_step() -> None:
    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tensor([0.1, 0.2, 0.3])

    node = trace(Wide(), torch.rand(2, 1)).nodes[0]
    assert not node.operator.entrywise
    assert node.operator.fan_out(node.shape) == 3


@pytest.mark.parametrize("certifier", [LipschitzCertifier, BoundCertifier])
def test_balls_say_nothing_of_float32_away_from_their_centre(certifier: type) -> None:
    model, x, y = nn.Sequential(nn.Linear(2, 2)).eval(), torch.rand(1, 2), torch.tensor([0])
    chosen = certifier(arithmetic="float32", **({"method": "lmt"} if certifier is BoundCertifier else {}))
    with pytest.raises(ValueError, match="arithmetic float32 is not stated by"):
        chosen(model, x, y, Threat("l2", 0.1))
