"""The contract of every registered attack."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import IN_PLACE, Trace, images, linear_model, linear_radius, small_cnn, twins
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from holdfast import Threat
from holdfast.attacks import (
    APGD,
    FAB,
    FGSM,
    FMN,
    PGD,
    Attack,
    AttackResult,
    AutoAttack,
    CarliniWagner,
    DeepFool,
    GradientAttack,
)
from holdfast.attacks.ensemble import Ensemble
from holdfast.fold import folded

ATTACKS = sorted(Attack.registry)
NORMS = ("linf", "l2", "l1")
SHORTER = {
    "square": {"queries": 300},
    "carlini-wagner": {"steps": 40, "searches": 5},
    "pgd": {"steps": 40},
    "sigma-zero": {"steps": 60},
}
"""Settings for attacks that take long by default."""


BLIND = ("square", "noise")
"""Attacks without gradients."""
KINDS = {
    ("noise", ""): "sound",
    ("square", ""): "weak",
    ("ddn", "linf"): "weak",
    ("ddn", "l1"): "weak",
    ("carlini-wagner", ""): "weak",
    ("sigma-zero", ""): "weak",
    ("fgsm", ""): "weak",
    ("fgsm", "linf"): "exact",
}
"""What is not expected to find the nearest point of every linear model: random search, l_2 attacks in other
norms, and one step where the box is in its way."""


def box_radius(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, norm: str, low: float, high: float
) -> torch.Tensor:
    """The exact radius of a linear model of two classes, box and all; inf where the box holds no wrong point."""
    weight, bias = model[-1].weight, model[-1].bias
    radii = []
    for image, label in zip(x.flatten(1), y, strict=True):
        w = (weight[1 - label] - weight[label]).detach()
        gap = (w @ image + bias[1 - label] - bias[label]).item()
        room = torch.where(w > 0, high - image, image - low)
        gain = w.abs()
        if (gain * room.clamp(max=1e6)).sum() < -gap:
            radii.append(math.inf)
        elif norm == "l0":
            reach = (gain * room.clamp(max=1e6)).sort(descending=True).values.cumsum(0)
            radii.append((reach < -gap).sum().item() + 1)
        elif norm == "l1":
            order = gain.argsort(descending=True)
            left, length = -gap, 0.0
            for i in order:
                step = min(left / gain[i].item(), room[i].item())
                left, length = left - step * gain[i].item(), length + step
            radii.append(length)
        else:
            speed = gain if norm == "l2" else torch.ones_like(gain)
            least, most = 0.0, 1e9
            for _ in range(200):
                level = (least + most) / 2
                enough = (gain * torch.minimum(level * speed, room)).sum() >= -gap
                least, most = (least, level) if enough else (level, most)
            delta = torch.minimum(most * speed, room)
            radii.append((delta.norm() if norm == "l2" else delta.max()).item())
    return torch.tensor(radii, dtype=torch.float64)


def short(name: str) -> Attack:
    return Attack.parse({"name": name, **SHORTER.get(name, {})})


every_attack = pytest.mark.parametrize("attack", [short(name) for name in ATTACKS], ids=ATTACKS)
SPARSE = ("sigma-zero",)
"""Attacks in l_0 and no other norm."""
every_norm = pytest.mark.parametrize(
    ("attack", "norm"),
    [
        pytest.param(short(name), norm, id=f"{norm}-{name}")
        for name in ATTACKS
        for norm in (("l0",) if name in SPARSE else NORMS)
    ],
)
RADII = {"linf": 0.2, "l2": 1.0, "l1": 5.0, "l0": 6}


def suited(attack: Attack, norm: str, eps: float) -> Threat:
    """The threat, or where the attack knows l_0 alone six entries; none for none."""
    return Threat("l0", 6 if eps else 0) if attack.name in SPARSE else Threat(norm, eps)


@every_norm
def test_stays_in_the_threat_set_and_reports_what_it_did(attack: Attack, norm: str) -> None:
    model, (x, y), threat = small_cnn().eval(), images(20), Threat(norm, RADII[norm])
    result = attack(model, x, y, threat)
    assert result.x_adv.shape == x.shape
    within = threat.distance(x, result.x_adv) <= threat.eps + 1e-5
    found = model(result.x_adv).argmax(1) != y
    assert (result.x_adv >= 0).all()
    assert (result.x_adv <= 1).all()
    assert torch.equal(result.success, found & within)
    assert torch.equal(result.success, found & (result.distance <= threat.eps + 1e-5))
    if attack.minimum_norm:
        assert torch.equal(found, torch.isfinite(result.distance))
    else:
        assert within.all()
        found[:] = True
    assert torch.allclose(result.distance[found], threat.distance(x, result.x_adv)[found])
    wrong = model(x).argmax(1) != y
    assert 0 < wrong.sum() < len(y)
    assert result.success[wrong].all()
    assert (result.distance[wrong] == 0).all()
    assert (result.forwards[wrong] == 1).all()
    assert (result.backwards[wrong] == 0).all()
    assert ((result.backwards > 0) | result.success)[~wrong].all() or attack.name in BLIND
    assert (result.forwards[~wrong] > 1).all()
    told = torch.tensor([bool(text) for text in result.origin])
    assert torch.equal(told, torch.isfinite(result.distance) & (model(result.x_adv).argmax(1) != y) & ~wrong)
    assert all(text.startswith(attack.name) or isinstance(attack, Ensemble) for text in result.origin if text)


EOT = sorted(name for name in ATTACKS if issubclass(Attack.registry[name], GradientAttack))
every_gradient_attack = pytest.mark.parametrize("name", EOT)
BRIEF = {"carlini-wagner": {"steps": 10, "searches": 2}, "apgd-t": {"targets": 2}, "fab": {"targets": 2}}


def averaging(name: str, samples: int, steps: int = 8) -> Attack:
    kind = Attack.registry[name]
    steps_of = {"steps": steps} if "steps" in kind.model_fields else {}
    return kind(samples=samples, **{**steps_of, **BRIEF.get(name, {})})


@every_attack
def test_leaves_no_trace_on_the_model_or_the_inputs(attack: Attack) -> None:
    model, (x, y) = small_cnn().train(), images(6)
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[6].weight.grad = torch.ones_like(model[6].weight)
    before, trace = x.clone(), Trace(model)
    attack(model, x, y, suited(attack, "linf", 0.1))
    trace.check()
    assert torch.equal(x, before)
    assert not x.requires_grad


@every_norm
def test_the_seed_decides_and_the_split_does_not(attack: Attack, norm: str) -> None:
    model, (x, y), threat = small_cnn().double(), images(11), Threat(norm, RADII[norm])
    x = x.double()
    whole = attack(model, x, y, threat, seed=3)
    again = attack(model, x, y, threat, seed=3)
    assert torch.equal(whole.x_adv, again.x_adv)
    small = attack(model, x, y, threat, seed=3, batch_size=4)
    assert torch.allclose(small.x_adv, whole.x_adv, atol=1e-9)
    assert torch.equal(small.success, whole.success)
    rows = torch.tensor([7, 2, 9])
    part = attack(model, x[rows], y[rows], threat, seed=3, indices=rows)
    assert torch.allclose(part.x_adv, whole.x_adv[rows], atol=1e-9)


@every_norm
@pytest.mark.parametrize("box", [math.inf, 1.0], ids=["no-box", "box"])
def test_breaks_a_linear_model_exactly_when_eps_exceeds_the_radius(attack: Attack, norm: str, box: float) -> None:
    model = linear_model(
        classes=2, shape=(1, 4, 5)
    ).double()  # with more, the steepest loss need not be the nearest
    count = 8 if attack.name == "autoattack" else 24
    x = torch.rand(count, 1, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    low, high = (-math.inf, math.inf) if box == math.inf else (0.0, 1.0)
    if attack.name == "carlini-wagner" and box == math.inf:
        low, high = -1e3, 1e3
    y = model(x).argmax(1)
    radius = box_radius(model, x, y, norm, low, high)
    kind = KINDS.get((attack.name, norm), KINDS.get((attack.name, ""), "exact"))
    for eps in radius[radius < math.inf].quantile(torch.tensor([0.2, 0.6], dtype=torch.float64)).tolist():
        result = attack(model, x, y, Threat(norm, eps, low, high))
        assert not result.success[radius > eps * (1 + 1e-9)].any()
        if kind == "exact":
            assert result.success[radius < 0.95 * eps].all()
        if attack.minimum_norm and kind == "exact":
            near = torch.isfinite(radius)
            if not getattr(attack, "within_eps", False):
                assert (result.distance[near] <= 1.05 * radius[near]).all()
        assert (result.distance[torch.isfinite(result.distance) & result.success] <= eps * (1 + 1e-6)).all()
    if kind != "sound":
        assert attack(
            model, x, y, Threat(norm, 3 * radius[radius < math.inf].max().item(), low, high)
        ).success.any()


@every_attack
def test_single_non_contiguous_and_border_inputs(attack: Attack) -> None:
    model, (x, y) = small_cnn(), images(4)
    turned = x.transpose(2, 3)
    straight = attack(model, turned.contiguous(), y, suited(attack, "linf", 0.1))
    assert torch.equal(attack(model, turned, y, suited(attack, "linf", 0.1)).x_adv, straight.x_adv)
    assert len(attack(model, x[:1], y[:1], suited(attack, "linf", 0.1)).x_adv) == 1
    assert len(attack(model, x[:0], y[:0], suited(attack, "linf", 0.1)).x_adv) == 0
    assert torch.equal(attack(model, x, y, suited(attack, "linf", 0.0)).x_adv, x)
    black = torch.zeros_like(x)
    assert (attack(model, black, y, suited(attack, "l2", 1.0)).x_adv >= 0).all()


@every_attack
def test_models_that_answer_nonsense_are_refused(attack: Attack) -> None:
    class Nan(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, :4] * torch.nan

    x, y = images(4)
    with pytest.raises(FloatingPointError, match="not finite"):
        attack(Nan(), x, y, suited(attack, "linf", 0.1))
    with pytest.raises(ValueError, match="label"):
        attack(small_cnn(classes=2), x, torch.full((4,), 2), suited(attack, "linf", 0.1))
    with pytest.raises(ValueError, match="box"):
        attack(small_cnn(), x * 2, y, suited(attack, "linf", 0.1))


@every_attack
def test_a_constant_model_is_never_broken(attack: Attack) -> None:
    class Constant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[1.0, 0.0]]).expand(len(x), 2)

    x, _ = images(3)
    result = attack(Constant(), x, torch.tensor([0, 0, 1]), suited(attack, "linf", 0.5))
    assert result.success.tolist() == [False, False, True]


def test_carlini_and_wagner_find_the_nearest_point_of_a_linear_model() -> None:
    model = linear_model(classes=2, shape=(1, 4, 5)).double()
    x = torch.rand(24, 1, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    radius = box_radius(model, x, y, "l2", 0.0, 1.0)
    result = CarliniWagner()(model, x, y, Threat("l2", 1.0))
    assert (result.distance >= radius * (1 - 1e-9)).all()
    assert (result.distance <= 1.05 * radius).all()
    with pytest.raises(ValueError, match="needs a finite box"):
        CarliniWagner()(model, x, y, Threat("l2", 1.0, -math.inf, math.inf))


def test_fmn_counts_the_pixels_it_changes() -> None:
    model = linear_model(classes=2, shape=(1, 4, 5)).double()
    x = torch.rand(24, 1, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    weight = (model[-1].weight[1] - model[-1].weight[0]).detach() * (1 - 2 * y[:, None])
    room = torch.where(weight > 0, 1 - x.flatten(1), x.flatten(1))
    gains = (weight.abs() * room).sort(dim=1, descending=True).values.cumsum(1)
    needed = (gains < (model(x)[:, 0] - model(x)[:, 1]).abs()[:, None]).sum(1) + 1
    result = FMN(steps=300, step_size=3.0)(model, x, y, Threat("l0", 3))
    assert (result.distance >= needed).all()
    assert (result.distance <= needed + 1).double().mean() > 0.9
    assert torch.equal(result.success, result.distance <= 3)


@pytest.mark.parametrize("name", ["pgd", "square", "noise"])
def test_norms_without_a_form_are_refused(name: str) -> None:
    x, _ = images(4)
    y = small_cnn().eval()(x).argmax(1)
    with pytest.raises(ValueError, match=r"attack (it|them) with fmn"):
        short(name)(small_cnn(), x, y, Threat("l0", 3))


@every_attack
def test_three_classes_float64_and_images_that_are_not_square(attack: Attack) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(12, 2, 5, 9, dtype=torch.float64, generator=generator)
    model = linear_model(classes=3, shape=(2, 5, 9)).double()
    y = model(x).argmax(1)
    threat = suited(attack, "l2", 0.3)
    result = attack(model, x, y, threat)
    assert result.x_adv.dtype == torch.float64
    assert torch.equal(
        result.success, (model(result.x_adv).argmax(1) != y) & (result.distance <= threat.eps + 1e-6)
    )
    with pytest.raises(ValueError, match="float32 or float64"):
        attack(model, x.half(), y, threat)


@pytest.mark.parametrize(
    "attack", [PGD(steps=20, precision="bf16"), APGD(steps=20, precision="bf16")], ids=lambda a: a.name
)
def test_bf16_finds_about_the_same_and_every_success_is_one(attack: Attack) -> None:
    model, (x, y) = small_cnn().eval(), images(200)
    threat = Threat("linf", 0.06)
    result = attack(model, x, y, threat)
    plain = attack.model_copy(update={"precision": "float32"})(model, x, y, threat)
    assert torch.equal(result.success, model(result.x_adv).argmax(1) != y)
    assert 0.1 < plain.success.double().mean() < 0.95
    assert abs(result.success.double().mean() - plain.success.double().mean()) < 0.05


def test_batch_norm_is_folded_only_where_the_copy_answers_alike() -> None:
    model, (x, _) = small_cnn().eval().requires_grad_(False), images(6)
    copy = folded(model, x)
    assert copy is not model
    assert not any(isinstance(module, nn.BatchNorm2d) for module in copy.modules())
    assert torch.allclose(copy(x), model(x), atol=1e-5)
    assert isinstance(model[1], nn.BatchNorm2d)

    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = small_cnn()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(x + 0.5 * torch.rand(1, 1, 8, 8))

    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.dense = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(256, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.dense(self.convolution(x).view(len(x), -1))  # impossible with channels last

    viewing = Viewing().eval().requires_grad_(False)
    assert folded(viewing, x) is viewing

    moody = Moody().eval().requires_grad_(False)
    assert folded(moody, x) is moody


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(context: object, x: torch.Tensor) -> torch.Tensor:
        return (8 * x).round() / 8

    @staticmethod
    def backward(context: object, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient


class Quantised(nn.Module):
    """A network behind a rounding, whose backward may pass gradients on."""

    def __init__(self, *, passing: bool) -> None:
        super().__init__()
        self.passing, self.network = passing, small_cnn()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(Rounded.apply(x) if self.passing else (8 * x).round() / 8)


def test_a_copy_with_batch_norm_folded_away_keeps_the_backward_of_a_module() -> None:
    model, (x, _) = Quantised(passing=True).eval().requires_grad_(False), images(6)
    points = x.clone().requires_grad_(True)
    (own,) = torch.autograd.grad(model(points).square().sum(), points)
    (slope,) = torch.autograd.grad(folded(model, x)(points).square().sum(), points)
    assert own.any()
    assert torch.allclose(slope, own, atol=1e-5)


@every_gradient_attack
def test_every_attack_by_gradient_follows_the_backward_of_a_module(name: str) -> None:
    (x, _), attack = images(12), averaging(name, 1, steps=30)
    blind, sighted = Quantised(passing=False).eval(), Quantised(passing=True).eval()
    y, threat = blind(x).argmax(1), suited(attack, "linf", 0.3)
    assert attack(sighted, x, y, threat).success.sum() > attack(blind, x, y, threat).success.sum()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_fab_without_targets_finds_the_nearest_class_of_a_linear_model(norm: str) -> None:
    model, x = linear_model(classes=5, shape=(1, 4, 4)).double(), torch.rand(20, 1, 4, 4).double()
    y, threat = model(x).argmax(1), Threat(norm, 100.0, -math.inf, math.inf)
    result = FAB(targeted=False, steps=20)(model, x, y, threat)
    exact = linear_radius(model, x, y, norm)
    assert (result.distance >= exact * (1 - 1e-9)).all()
    assert (result.distance <= 1.05 * exact).all()
    # The clean pass; two forwards a step; the confirmation; a backward pass for each of the other classes.
    assert result.forwards.tolist() == [42] * 20
    assert result.backwards.tolist() == [80] * 20
    assert all("target" not in text for text in result.origin)


def test_autoattack_is_the_published_ensemble() -> None:
    standard = AutoAttack(reference=True).parts(Threat("linf", 0.1), 10)
    assert [part.name for part in standard] == ["apgd", "apgd-t", "fab", "square"]
    apgd, targeted, fab, square = standard
    assert (apgd.steps, apgd.restarts, apgd.loss) == (100, 1, "cross-entropy")
    assert (targeted.steps, targeted.targets) == (100, 9)
    assert (fab.steps, fab.targets, fab.restarts) == (100, 9, 1)
    assert (square.queries, square.share, square.restarts, square.rescaled) == (5000, 0.8, 1, False)
    plus = AutoAttack(version="plus", reference=True).parts(Threat("linf", 0.1), 10)
    assert [(part.name, getattr(part, "restarts", 1)) for part in plus] == [
        ("apgd", 5),
        ("apgd", 5),
        ("fab", 5),
        ("square", 1),
        ("apgd-t", 1),
        ("fab", 1),
    ]
    for version, published in (("standard", standard), ("plus", plus)):
        first, *others = AutoAttack(version=version).parts(Threat("linf", 0.1), 10)
        assert (first.name, first.loss, first.steps) == ("pgd", "margin", 20)
        assert others == published
    assert [part.samples for part in AutoAttack(version="rand").parts(Threat("linf", 0.1), 10)] == [20, 20]


def test_autoattack_stands_on_the_shoulders_of_its_parts_and_says_which(caplog: pytest.LogCaptureFixture) -> None:
    model, (x, y) = small_cnn().eval(), images(60)
    threat = Threat("linf", 0.05)
    whole = AutoAttack(reference=True)(model, x, y, threat)
    right = model(x).argmax(1) == y
    assert (whole.success | ~APGD()(model, x, y, threat).success).all()
    assert {text.split()[0] for text in whole.origin if text} <= {"apgd", "apgd-t", "fab", "square"}
    survivors = right & ~whole.success
    assert survivors.any()
    # APGD 101, targeted 3 × 101, FAB 3 × 101 and a pass for every success, Square 5000, the clean one
    assert (whole.forwards[survivors] <= 1 + 101 + 303 + 303 + 303 + 5000).all()
    assert (whole.forwards[survivors] >= 1 + 101 + 303 + 303 + 5000).all()
    assert (whole.backwards[survivors] == 100 + 300 + 300).all()
    verdict = AutoAttack()(model, x, y, threat)
    assert (verdict.success >= whole.success).all()
    assert (verdict.backwards[right & ~verdict.success] == 20 + 100 + 300 + 300).all()
    two = linear_model(classes=2, shape=(1, 8, 8))
    AutoAttack(version="quick")(two, x[:4], y[:4] % 2, threat)
    assert "the margin stands for the DLR loss" in caplog.text


def test_the_strongest_restart_is_kept() -> None:
    model, (x, y) = small_cnn().eval(), images(30)
    threat = Threat("linf", 0.01)
    one, five = (PGD(steps=3, restarts=k)(model, x, y, threat) for k in (1, 5))

    def loss(result: AttackResult) -> torch.Tensor:
        return nn.functional.cross_entropy(model(result.x_adv), y, reduction="none")

    standing = ~five.success
    assert (loss(five) >= loss(one) - 1e-6)[standing].all()
    assert (loss(five) > loss(one) + 1e-6)[standing].any()


@pytest.mark.parametrize("loss", ["cross-entropy", "dlr", "margin", "kl"])
@pytest.mark.parametrize("target", [None, "next", "least-likely", "random"])
def test_every_loss_and_target_raises_what_it_names(loss: str, target: str | None) -> None:
    model, (x, y) = small_cnn().eval(), images(40)
    right = model(x).argmax(1) == y
    attack = PGD(steps=20, loss=loss, target=target, random_start=loss == "kl", momentum=0.5)
    result = attack(model, x, y, Threat("linf", 0.3))
    assert result.success[right].double().mean() > 0.4


@every_attack
def test_a_model_that_is_nan_away_from_the_inputs_is_no_robust_model(attack: Attack) -> None:
    x, _ = images(6)
    inner = small_cnn().eval()

    class Cliff(nn.Module):
        def forward(self, points: torch.Tensor) -> torch.Tensor:
            known = (points[:, None] - x[None]).abs().flatten(2).amax(2).amin(1) < 1e-6
            return torch.where(known[:, None], inner(points), torch.nan)

    y = inner(x).argmax(1)
    with pytest.raises(FloatingPointError, match="NaN"):
        attack(Cliff(), x, y, suited(attack, "l2", 0.3))


def test_attacks_that_see_answers_only_have_nothing_to_average() -> None:
    ensembles = {name for name in ATTACKS if issubclass(Attack.registry[name], Ensemble)}
    assert set(ATTACKS) - set(EOT) == {*BLIND, *ensembles}


def test_deepfool_looks_beyond_what_certificates_exclude() -> None:
    model, x = linear_model(classes=5, shape=(1, 4, 4)).double(), torch.rand(8, 1, 4, 4).double()
    y, threat = model(x).argmax(1), Threat("l2", 0.01)
    closed = torch.zeros(8, 5, dtype=torch.bool)
    closed[:, 0] = True
    plain, spared = (DeepFool()(model, x, y, threat, open_targets=which) for which in (None, closed))
    assert torch.equal(spared.distance, plain.distance)


@every_gradient_attack
def test_averaged_passes_are_counted_and_change_nothing_where_the_model_answers_alike(name: str) -> None:
    calls = 0

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = linear_model(classes=4, shape=(1, 8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += len(x)
            return self.network(x)

    (x, _), model = images(8), Counting()
    y, threat = model(x).argmax(1), suited(averaging(name, 1), "l2", 0.3)
    once = averaging(name, 1)(model, x, y, threat)
    calls = 0
    twice = averaging(name, 2)(model, x, y, threat)
    assert torch.equal(once.x_adv, twice.x_adv)
    assert torch.equal(once.success, twice.success)
    assert torch.equal(twice.forwards - 1, 2 * (once.forwards - 1))  # but for the clean pass
    assert torch.equal(twice.backwards, 2 * once.backwards)
    assert twice.backwards.sum() > 0
    if name not in ("apgd", "apgd-t", "pgd", "multi-targeted"):  # where the finished stay in the batch for a while
        assert twice.forwards.sum() == calls


class Coin(nn.Module):
    """Right, and wrong with some probability wherever it is asked."""

    def __init__(self, wrong: float) -> None:
        super().__init__()
        self.wrong, self.network = wrong, linear_model(classes=4, shape=(1, 8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.network(x)
        turned = (torch.rand(len(x), 1) < self.wrong) & (x != 0.5).flatten(1).any(1, keepdim=True)
        return torch.where(turned, -logits, logits)


@every_gradient_attack
def test_a_success_on_a_model_that_answers_at_random_is_what_most_passes_get_wrong(name: str) -> None:
    x = torch.full((6, 1, 8, 8), 0.5)  # here it answers alike
    y, threat = Coin(0)(x).argmax(1), suited(averaging(name, 1), "linf", 1e-6)
    assert averaging(name, 25).passes == 25
    assert not averaging(name, 25, steps=3)(Coin(0.15), x, y, threat).success.any()
    likely = averaging(name, 25, steps=3)(Coin(0.9), x, y, threat)
    assert likely.adversarial_distance.isfinite().all()


def test_a_lucky_pass_alone_is_no_success() -> None:
    x = torch.full((200, 1, 8, 8), 0.5)
    y = Coin(0)(x).argmax(1)
    result = PGD(steps=20)(Coin(0.1), x, y, Threat("linf", 1e-6))
    # Nine in ten meet a wrong answer in 20 steps, twice; one in ten answers wrongly when asked once more.
    assert result.success.double().mean() < 0.3


def test_averaged_gradients_see_through_noise() -> None:
    class Noisy(nn.Module):
        """Its answers are the network's; its gradients have as much noise as signal several times over."""

        def __init__(self) -> None:
            super().__init__()
            self.network = linear_model(classes=4, shape=(1, 8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = self.network(x)
            noise = torch.randn(len(x), 4, 64)
            return logits + 10 * (noise @ (x - x.detach()).flatten(1)[:, :, None]).squeeze(2)

    model, (x, _) = Noisy(), images(60)
    y, threat = model(x).argmax(1), Threat("linf", 0.05)
    true = FGSM()(model.network, x, y, threat).success.sum()
    one, many = (FGSM(samples=samples)(model, x, y, threat).success.sum() for samples in (1, 100))
    assert one < 0.5 * true
    assert many > 0.7 * true


def test_autoattack_leaves_square_out_where_there_are_no_images() -> None:
    model = nn.Linear(10, 5)
    x = torch.rand(8, 10)
    result = AutoAttack()(model, x, model(x).argmax(1), Threat("linf", 1e-3))
    assert result.success.sum() < 8


CHEAP = sorted(name for name in Attack.registry if name not in ("autoattack", "square", "multi-targeted"))


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(CHEAP),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(4, 6),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_attacks_take_inputs_of_any_shape(
    name: str, shape: list[int], count: int, classes: int, dtype: torch.dtype
) -> None:
    model = linear_model(classes=classes, shape=tuple(shape)).to(dtype)
    kind = Attack.registry[name]
    attack = kind(steps=3) if "steps" in kind.model_fields else kind()
    x, threat = torch.rand(count, *shape).to(dtype), suited(attack, "l2", 0.5)
    y = model(x).argmax(1)
    result = attack(model, x, y, threat)
    assert result.x_adv.shape == x.shape
    assert result.x_adv.dtype == dtype
    assert torch.equal(
        model(result.x_adv[result.success]).argmax(1) != y[result.success], result.success[result.success]
    )
    assert (threat.distance(x, result.x_adv)[result.success] <= threat.eps * (1 + 1e-5)).all()
    assert 0 <= result.x_adv.min() <= result.x_adv.max() <= 1


@every_attack
@pytest.mark.parametrize("name", IN_PLACE)
def test_a_model_that_works_in_place_is_attacked_like_one_that_does_not(attack: Attack, name: str) -> None:
    (hasty, plain), (x, y), threat = twins(name), images(6), suited(attack, "linf", 0.1)
    y = plain.eval()(x).argmax(1)
    before = x.clone()
    result, expected = attack(hasty, x, y, threat), attack(plain, x, y, threat)
    assert torch.equal(x, before)
    assert torch.equal(result.x_adv, expected.x_adv)
    assert torch.equal(result.success, expected.success)


class Shifty(nn.Module):
    """Wrong wherever kernels are not deterministic, which stands for any faster arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.network = linear_model(classes=3, shape=(1, 8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.network(x)
        return logits if torch.are_deterministic_algorithms_enabled() else -logits


@pytest.mark.parametrize("name", ["fgsm", "pgd", "fmn"])
def test_a_success_counts_in_plain_arithmetic_only(name: str) -> None:
    x, _ = images(8)
    model = Shifty()
    y = model.network(x).argmax(1)
    result = Attack.parse(name)(model, x, y, Threat("linf", 1e-4))
    assert not result.success.any()


@pytest.mark.parametrize("name", ["fab", "deepfool"])
def test_the_nearest_beyond_eps_may_be_of_a_class_that_is_excluded_within(name: str) -> None:
    model, (x, _) = linear_model(classes=4, shape=(1, 8, 8)), images(6)
    y = model(x).argmax(1)
    threat, attack = Threat("l2", 1e-4, -torch.inf, torch.inf), Attack.parse(name)
    last = model(x).argmin(1)
    only = torch.nn.functional.one_hot(last, 4).bool()
    assert torch.equal(attack(model, x, y, threat, open_targets=only).x_adv, attack(model, x, y, threat).x_adv)
