"""PGD against the original implementations, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import images, small_cnn
from torch import Tensor, nn

from holdfast import Threat
from holdfast.attacks import FGSM, PGD, MultiTargeted
from holdfast.attacks.attack import Targets
from holdfast.attacks.losses import cross_entropy, until_wrong, until_wrong_towards
from holdfast.attacks.pgd import FIELDS, choose_target, coarse_start, likeliest
from holdfast.layers import Normalize
from holdfast.search import Steepest, climb


class BoxFirst(Threat):
    """The local-Lipschitz line clips a step to the box before the ball and again after it; ours clips after."""

    def project(self, x: Tensor, x_adv: Tensor) -> Tensor:
        return super().project(x, x_adv.clamp(self.low, self.high))


Arrays = Callable[[str], dict[str, Tensor]]


@pytest.fixture
def lolip_net(reference: Arrays) -> nn.Module:
    """The network of the local-Lipschitz reference: convolution, tanh, two dense layers."""
    arrays = reference("lolip_net_and_inputs")
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(54, 10), nn.Tanh(), nn.Linear(10, 4)
    )
    names = {"0": "conv", "3": "fc1", "5": "fc2"}
    net.load_state_dict({f"{i}.{p}": arrays[f"net.{n}.{p}"] for i, n in names.items() for p in ("weight", "bias")})
    return net


@pytest.fixture
def nc_net(reference: Arrays) -> nn.Module:
    """The network of the neural-collapse reference, in float64."""
    arrays = reference("nc_attacks")
    net = nn.Sequential(
        Normalize([0.0] * 3, [1.0] * 3),
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).double()
    names = {"1": "c1", "4": "c2", "8": "fc"}
    state = {f"{i}.{p}": arrays[f"w_{n}.{p}"] for i, n in names.items() for p in ("weight", "bias")}
    net.load_state_dict(state | {"0.mean": arrays["in_mu"], "0.std": arrays["in_std"]})
    return net


@pytest.mark.parametrize(("norm", "key", "eps"), [("linf", "inf", 0.1), ("l2", "l2", 0.5)])
def test_steps_equal_the_local_lipschitz_line(
    reference: Arrays, lolip_net: nn.Module, norm: str, key: str, eps: float
) -> None:
    arrays = reference("lolip_pgd")
    x, y = arrays["x"], arrays["y"]
    function = until_wrong(lolip_net, y)
    for steps in (1, 2, 3, 5, 10):
        x_adv = climb(function, x, BoxFirst(norm, eps), steps=steps, step_size=eps / 5, start=x)
        assert torch.allclose(x_adv, arrays[f"{key}_untargeted_it{steps}"], atol=1e-5)
        if steps <= 5:  # the ball is not reached yet, so that the order is all one
            ours = climb(function, x, Threat(norm, eps), steps=steps, step_size=eps / 5, start=x)
            assert torch.allclose(ours, x_adv, atol=1e-6)
    losses = F.cross_entropy(lolip_net(x_adv), y, reduction="none")
    assert torch.allclose(losses, arrays[f"{key}_untargeted_it10_ce"], rtol=1e-5)
    free = climb(function, x, Threat(norm, eps, -math.inf, math.inf), steps=10, step_size=eps / 5, start=x)
    assert torch.allclose(free, arrays[f"{key}_noclip_it10"], atol=1e-5)


@pytest.mark.parametrize(
    ("norm", "eps", "step"), [("linf", 8 / 255, 2 / 255), ("l2", 128 / 255, 15 / 255)], ids=["linf", "l2"]
)
def test_steps_equal_the_neural_collapse_line(
    reference: Arrays, nc_net: nn.Module, norm: str, eps: float, step: float
) -> None:
    arrays = reference("nc_attacks")
    x, y = arrays["in_X"].double(), arrays["in_y"]
    assert torch.allclose(nc_net(x), arrays["f64_logits"], atol=1e-9)
    function = until_wrong(nc_net, y)
    for steps in (1, 2, 10):
        x_adv = climb(function, x, Threat(norm, eps), steps=steps, step_size=step, start=x)
        assert torch.allclose(x_adv - x, arrays[f"f64_pgd_{norm}_zero_it{steps}"], atol=1e-8)
    start = x + arrays[f"f64_pgd_{norm}_rand_it0"]
    x_adv = climb(function, x, Threat(norm, eps), steps=10, step_size=step, start=start)
    assert torch.allclose(x_adv - x, arrays[f"f64_pgd_{norm}_rand_it10"], atol=1e-8)


@pytest.mark.parametrize(
    ("norm", "eps", "step"), [("linf", 8 / 255, 2 / 255), ("l2", 128 / 255, 15 / 255)], ids=["linf", "l2"]
)
def test_the_cyclic_target_equals_the_neural_collapse_line(
    reference: Arrays, nc_net: nn.Module, norm: str, eps: float, step: float
) -> None:
    arrays = reference("nc_attacks")
    x, y = arrays["in_X"].double(), arrays["in_y"]
    targets = Targets(x, y, nc_net(x).detach(), torch.arange(len(x)), 0, 256)
    target = choose_target("next", targets)
    assert target.tolist() == ((y + 1) % 5).tolist()
    function = until_wrong_towards(nc_net, y, target, lambda z, y, t: -cross_entropy(z, t))
    x_adv = climb(function, x, Threat(norm, eps), steps=10, step_size=step, start=x)
    assert torch.allclose(x_adv - x, arrays[f"f64_pgd_{norm}_zero_targeted_it10"], atol=1e-8)
    # The attack itself takes these steps, stops at the first wrong answer and keeps the best point.
    attack = PGD(target="next", steps=10, step_size=step / eps, random_start=False)
    right = nc_net(x).argmax(1) == y
    result = attack(nc_net, x, y, Threat(norm, eps))
    never = right & ~result.success
    reached = F.cross_entropy(nc_net(result.x_adv), target, reduction="none")
    last = F.cross_entropy(nc_net(x_adv), target, reduction="none")
    assert (reached[never] <= last[never] + 1e-9).all()


def test_fgsm_is_pgd_with_one_whole_step() -> None:
    model, (x, y) = small_cnn(), images(10)
    threat = Threat("linf", 0.1)
    one = PGD(steps=1, step_size=1.0, random_start=False)
    assert torch.equal(FGSM()(model, x, y, threat).x_adv, one(model, x, y, threat).x_adv)


def test_more_restarts_and_steps_never_break_fewer() -> None:
    model, (x, y) = small_cnn(), images(60)
    threat = Threat("linf", 0.05)
    one = PGD(steps=5)(model, x, y, threat).success
    five = PGD(steps=5, restarts=5)(model, x, y, threat).success
    assert (five | ~one).all()  # the first restart is the same
    assert five.sum() > (small_cnn().eval()(x).argmax(1) != y).sum()


def test_the_first_success_ends_an_example() -> None:
    model, (x, y) = small_cnn(), images(30)
    result = PGD(steps=50, restarts=3)(model, x, y, Threat("linf", 0.5))
    right = small_cnn().eval()(x).argmax(1) == y
    assert result.success.all()
    assert result.forwards[right].max() < 50


def test_it_is_named_as_the_field_names_it() -> None:
    assert PGD(steps=100).title == "PGD-100"
    assert PGD(steps=20, restarts=5).title == "PGD-20 × 5"


def test_a_step_shrinks_as_its_schedule_says() -> None:
    model, (x, _) = small_cnn().eval(), images(3)
    y = model(x).argmax(1)
    threat, first = (
        Threat("linf", 1e-5, -math.inf, math.inf),
        0.02,
    )  # in units of eps: no ball and no box on the way
    for schedule, left in {
        "constant": lambda t: 1.0,
        "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
        "geometric": lambda t: 100.0**-t,
    }.items():
        attack = PGD(steps=4, step_size=first, schedule=schedule, random_start=False)
        rule = Steepest(threat, threat.eps * attack._first_step, decay=attack._decay)
        points, gradient = x.double(), torch.ones_like(x).double()
        for step in range(4):
            moved = rule.move({}, x.double(), points, y, gradient, torch.full((3,), step))
            assert torch.allclose(moved - points, torch.full_like(points, first * 1e-5 * left(step / 4)))
            points = moved
    assert PGD(steps=50)._first_step == 2.5 / 50
    assert PGD(steps=50, schedule="cosine")._first_step == 1


def test_only_open_targets_are_likely() -> None:
    logits = torch.tensor([[5.0, 3, 4, 1], [5, 3, 4, 1]])
    y = torch.zeros(2, dtype=torch.int64)
    targets = Targets(torch.zeros(2, 3), y, logits, torch.arange(2), 0, 8)
    assert torch.stack(likeliest(targets), 1).tolist() == [[2, 1, 3]] * 2
    some = targets._replace(open=torch.tensor([[True, False, True, True], [True, True, False, False]]))
    assert torch.stack(likeliest(some), 1).tolist() == [[2, 3, -1], [1, -1, -1]]
    assert torch.stack(likeliest(some, 1), 1).tolist() == [[2], [1]]


def test_a_step_in_l1_moves_the_share_of_largest_slope_that_the_box_lets_move() -> None:
    threat = Threat("l1", 1.0)
    gradient = torch.tensor([[4.0, -3.0, 2.0, 1.0, 0.0], [0.0, 0.0, 1e-9, 0.0, 0.0], [0.0] * 5])
    x = torch.tensor([[1.0, 0.5, 0.5, 0.5, 0.5]] * 3)  # the first entry is at the end of the box
    assert threat.steepest(gradient, x).tolist() == [[0, -1, 0, 0, 0], [0, 0, 1, 0, 0], [0] * 5]
    assert threat.steepest(gradient, x, 0.4).tolist() == [[0, -0.5, 0.5, 0, 0], [0, 0, 1, 0, 0], [0] * 5]
    assert threat.steepest(gradient, x, 1.0)[0].tolist() == pytest.approx([0, -1 / 3, 1 / 3, 1 / 3, 0])


def test_pgd_in_l1_is_stronger_by_a_share_of_the_entries_than_by_one() -> None:
    model, (x, _) = small_cnn(channels=3).eval(), images(100, channels=3)
    y, threat = model(x).argmax(1), Threat("l1", 3.0)
    one, many, default = (
        PGD(steps=20, share=share)(model, x, y, threat).success.sum() for share in (1e-6, 0.02, None)
    )
    assert many > one
    assert default >= one


def test_a_share_in_another_norm_is_refused() -> None:
    x, _ = images(4)
    y = small_cnn().eval()(x).argmax(1)
    for attack in (PGD(share=0.1), MultiTargeted(share=0.1)):
        with pytest.raises(ValueError, match=r"share=0.1 is for steps in l1; leave it out for linf"):
            attack(small_cnn(), x, y, Threat("linf", 0.1))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_coarse_start_is_far_away_and_the_same_over_each_field(norm: str) -> None:
    x = torch.full((3, 2, 10, 8), 0.5)
    targets = Targets(x, torch.zeros(3).long(), torch.zeros(3, 4), torch.arange(3), 0, 3)
    threat, every = Threat(norm, {"linf": 0.2, "l2": 1.0, "l1": 6.0}[norm]), torch.arange(3)
    start = coarse_start(targets, threat)
    points = start(every, 0)
    assert torch.allclose(threat.distance(x, points), torch.full((3,), threat.eps), rtol=1e-5)
    delta = points - x
    for first, last in ((0, 2), (3, 4), (5, 7), (8, 9)):  # of ten rows in four fields
        assert torch.equal(delta[:, :, first], delta[:, :, last])
    assert torch.equal(delta[..., ::2], delta[..., 1::2])
    assert len(delta[0, 0].unique()) == (2 if norm == "linf" else FIELDS**2)
    assert not torch.equal(start(every, 1), points)
    assert not torch.equal(coarse_start(targets, threat, 1)(every, 0), points)
    assert torch.equal(start(every[1:], 0), points[1:])


def test_a_coarse_start_stays_in_the_box_and_of_vectors_is_uniform() -> None:
    x, y = images(6)
    model = small_cnn().eval()
    threat = Threat("linf", 0.4)
    result = PGD(steps=1, coarse=True)(model, x, y, threat)
    assert (result.x_adv >= 0).all()
    assert (result.x_adv <= 1).all()
    flat = nn.Sequential(nn.Unflatten(1, x.shape[1:]), model)
    vectors = [PGD(steps=2, coarse=coarse)(flat, x.flatten(1), y, threat).x_adv for coarse in (False, True)]
    assert torch.equal(*vectors)
