"""Every attack, however it is called: modes, types, masks, strange gradients, compiled modules, arrays."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from holdfast import Threat, evaluate
from holdfast.attacks import APGD, DDN, FAB, FMN, PGD, CarliniWagner, DeepFool
from holdfast.attacks.attack import Attack, AttackResult, Targets, in_type
from holdfast.attacks.losses import cross_entropy, divergence, dlr, gap, targeted_dlr, targeted_gap
from holdfast.attacks.pgd import choose_target, likeliest

INF = math.inf
Map = Callable[[Tensor], Tensor]
SHORT: dict[str, dict[str, Any]] = {
    "apgd": {"steps": 6},
    "apgd-t": {"steps": 6, "targets": 2},
    "autoattack": {"version": "quick"},
    "carlini-wagner": {"steps": 6, "searches": 2},
    "ddn": {"steps": 15},
    "deepfool": {"steps": 6},
    "fab": {"steps": 5, "targets": 2},
    "fmn": {"steps": 15},
    "ladder": {"budget": "quick"},
    "multi-targeted": {"steps": 6, "targets": 2},
    "pgd": {"steps": 8},
    "sigma-zero": {"steps": 15},
    "square": {"queries": 30},
}
ATTACKS = [Attack.parse({"name": name, **SHORT.get(name, {})}) for name in sorted(Attack.registry)]
GRADIENTS = [attack for attack in ATTACKS if attack.sees == "gradients"]
every_attack = pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
every_gradient = pytest.mark.parametrize("attack", GRADIENTS, ids=lambda attack: attack.name)
LINF, L2 = Threat("linf", 0.06), Threat("l2", 0.4)


def fit(attack: Attack, threat: Threat) -> Threat:
    """This threat, or one that the attack has a form for."""
    return Threat("l0", 6) if attack.name == "sigma-zero" else threat


def network(classes: int = 6) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Flatten(), nn.Linear(25, 12), nn.ReLU(), nn.Linear(12, classes)
    return nn.Sequential(*layers).eval()


class After(nn.Module):
    """A network with something before and something behind it."""

    def __init__(self, behind: Map, before: Map = lambda x: x) -> None:
        super().__init__()
        self.network, self.behind, self.before = network(), behind, before

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.network(self.before(x)))


def images() -> tuple[Tensor, Tensor]:
    x = torch.rand(6, 1, 5, 5, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return x, network()(x).argmax(1)


def assert_same(result: AttackResult, expected: AttackResult) -> None:
    assert torch.equal(result.success, expected.success)
    assert torch.allclose(result.x_adv, expected.x_adv, atol=1e-5)
    assert not result.x_adv.is_inference()


@every_attack
def test_the_callers_grad_mode_makes_no_difference(attack: Attack) -> None:
    x, y = images()
    expected = attack(network(), x, y, fit(attack, L2))
    with torch.no_grad():
        assert_same(attack(network(), x, y, fit(attack, L2)), expected)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert_same(
            attack(network(), x.clone(), y.clone(), fit(attack, L2)), expected
        )  # whose weights are its own, too
        assert torch.is_inference_mode_enabled()


@every_attack
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_logits_of_another_type_are_attacked_like_those_of_the_inputs(attack: Attack, dtype: torch.dtype) -> None:
    x, y = images()
    model = After(lambda logits: logits.to(dtype)).eval()
    result, plain = attack(model, x, y, fit(attack, L2)), attack(network(), x, y, fit(attack, L2))
    assert result.x_adv.dtype == result.distance.dtype == torch.float32
    assert (model(result.x_adv).argmax(1) != y)[result.success].all()
    assert int(result.success.sum()) >= int(plain.success.sum()) - (2 if dtype == torch.bfloat16 else 1)


def test_a_finer_type_keeps_its_largest_in_a_coarser_one() -> None:
    fine = torch.tensor([[100.0, 100.0 + 1e-9, 0.0]], dtype=torch.float64)
    assert in_type(fine, torch.float32).argmax(1).tolist() == [1]
    assert in_type(fine, torch.float32).dtype == torch.float32
    assert in_type(torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16), torch.float32).tolist() == [[1.0, 2.0]]


def masked(logits: Tensor, classes: int = 3) -> Tensor:
    return logits.index_fill(1, torch.arange(classes, logits.shape[1]), -INF)


@every_attack
def test_masked_classes_are_never_the_answer_and_hinder_nothing(attack: Attack) -> None:
    x, _ = images()
    for classes in (3, 2):
        model = After(partial(masked, classes=classes)).eval()
        small = After(partial(torch.narrow, dim=1, start=0, length=classes)).eval()
        y = small(x).argmax(1)
        result, expected = attack(model, x, y, fit(attack, L2)), attack(small, x, y, fit(attack, L2))
        assert torch.equal(result.success, expected.success)
        assert model(result.x_adv).argmax(1).max() < classes
    one = After(lambda logits: logits.index_fill(1, torch.arange(1, 6), -INF)).eval()
    assert not attack(one, x, torch.zeros(6).long(), fit(attack, L2)).success.any()


def test_targets_are_none_of_the_masked_classes() -> None:
    logits = torch.tensor([[3.0, -INF, 1.0, 2.0, -INF], [-INF, 3.0, -INF, -INF, 1.0]])
    x, y, numbers = torch.zeros(2, 1), torch.tensor([0, 1]), torch.arange(2)
    targets = Targets(x, y, logits, numbers, 0, 2, logits > -INF)
    assert [target.tolist() for target in likeliest(targets)][:2] == [[3, 4], [2, -1]]
    assert choose_target("next", targets).tolist() == [2, 4]
    assert choose_target("least-likely", targets).tolist() == [2, 4]


def test_losses_of_masked_logits_are_those_of_the_others() -> None:
    logits = torch.tensor([[1.0, -INF, 3.0, 0.5, 0.0]], requires_grad=True)
    kept, y, t = logits.detach()[:, [0, 2, 3, 4]].requires_grad_(), torch.tensor([2]), torch.tensor([0])
    of_kept = torch.tensor([1])
    pairs = [
        (cross_entropy(logits, y), cross_entropy(kept, of_kept)),
        (gap(logits, y), gap(kept, of_kept)),
        (dlr(logits, y), dlr(kept, of_kept)),
        (targeted_gap(logits, y, t), targeted_gap(kept, of_kept, t)),
        (targeted_dlr(logits, y, t), targeted_dlr(kept, of_kept, t)),
        (divergence(2 * logits, logits), divergence(2 * kept, kept)),
    ]
    for own, expected in pairs:
        assert torch.allclose(own, expected, atol=1e-6)
        (slope,), (other,) = torch.autograd.grad(own, logits), torch.autograd.grad(expected, kept)
        assert torch.allclose(slope[:, [0, 2, 3, 4]], other, atol=1e-6)
        assert slope[0, 1] == 0
    two = torch.tensor([[1.0, -INF, 3.0, -INF, -INF]])
    assert dlr(two, y).tolist() == targeted_dlr(two, y, t).tolist() == gap(two, y).tolist() == [-2.0]
    for loss in (cross_entropy, gap, dlr):
        assert loss(two, torch.tensor([1])).isfinite().all()  # a label that is masked
        assert loss(torch.tensor([[1.0, torch.nan, 0.0]]), torch.tensor([0])).isnan().all()
    assert gap(torch.tensor([[1.0, INF, 0.0]]), torch.tensor([0])).tolist() == [INF]


@every_gradient
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_infinite_gradients_of_black_pixels_stop_no_image(attack: Attack, norm: str) -> None:
    x, _ = images()
    x[:3, :, :2] = 0
    threat = fit(attack, Threat(norm, {"l2": 0.4, "l1": 1.5}[norm]))
    model = After(lambda logits: logits, lambda x: x.sqrt()).eval()
    y = model(x).argmax(1)
    result = attack(model, x, y, threat)
    assert result.odd is not None
    if attack.name != "carlini-wagner":  # whose points never lie on the edge of the box
        assert result.odd[:3].any()
    bright = attack(model, x[3:], y[3:], threat, indices=[3, 4, 5])
    assert torch.equal(bright.success, result.success[3:])
    assert torch.isfinite(result.x_adv).all()


@pytest.mark.parametrize("attack", [one for one in GRADIENTS if fit(one, L2) is L2], ids=lambda attack: attack.name)
def test_what_stands_for_gradients_of_nan_is_tried_without_them_and_counted(attack: Attack) -> None:
    x, y = images()
    model = After(lambda logits: logits, lambda x: x + 0 * (0 * x).sqrt()).eval()
    evaluation = evaluate(model, x, y, Threat("l2", 0.8), attacks=[attack])
    table, name = evaluation.table, attack.name
    odd, at_once = table[f"{name}.odd"], table[f"{name}.origin"].str.endswith("step 0")  # where it began, by chance
    assert (odd | at_once).all()
    assert odd.sum() >= 4
    assert table[f"{name}.success"].any()
    assert all(text.startswith("square") for text in table[f"{name}.origin"][~at_once] if text)
    assert (table[f"{name}.distance"][table[f"{name}.success"]] <= 0.8 + 1e-6).all()
    (told,) = [text for text in evaluation.summary["warnings"] if "NaN or inf" in text]
    assert f"the gradients of {odd.sum()} of 6 examples were NaN or inf on the way of {name}" in told
    assert f"{int((~table[f'{name}.success']).sum())} of these stand" in told


def test_vectors_with_gradients_of_nan_are_tried_with_noise_and_counts_with_nothing() -> None:
    x, y = images()
    model = After(lambda logits: logits, lambda x: x + 0 * (0 * x).sqrt()).eval()
    result = PGD(steps=2, random_start=False)(model, x.flatten(1), y, Threat("linf", 0.5))
    assert {text.split()[0] for text in result.origin if text} == {"noise"}
    assert result.odd is not None
    assert result.odd.all()
    assert not FMN(steps=2)(model, x, y, Threat("l0", 2)).success.any()


MODULES: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "scripted": lambda model, x: torch.jit.script(model),
    "traced": lambda model, x: torch.jit.trace(model, x),
    "frozen": lambda model, x: torch.jit.freeze(torch.jit.script(model)),
    "exported": lambda model, x: torch.export.export(
        model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    ).module(),
    "compiled": lambda model, x: torch.compile(model, backend="eager"),
    "parallel": lambda model, x: nn.DataParallel(model),
    "frozen within": lambda model, x: nn.Sequential(MODULES["frozen"](model, x)),
    "exported within": lambda model, x: nn.Sequential(MODULES["exported"](model, x)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", MODULES)
def test_compiled_modules_are_attacked_like_what_they_were_made_from(kind: str) -> None:
    x, y = images()
    model = MODULES[kind](network(), x)
    for attack in (
        PGD(steps=3),
        FMN(steps=3),
        FAB(steps=2, targets=1),
        Attack.parse({"name": "square", "queries": 5}),
    ):
        assert_same(attack(model, x, y, LINF), attack(network(), x, y, LINF))


def test_a_module_exported_for_one_size_of_batches_is_refused_in_words() -> None:
    x, y = images()
    model = torch.export.export(network(), (x,)).module()
    with pytest.raises(ValueError, match="exported for batches of 6 and takes no others"):
        PGD()(model, x, y, LINF)


@every_attack
def test_arrays_and_lists_are_taken_and_functions_refused(attack: Attack) -> None:
    x, y = images()
    model = network()
    expected = attack(model, x, y, fit(attack, LINF))
    assert_same(attack(model, x.numpy(), y.numpy(), fit(attack, LINF)), expected)  # type: ignore[arg-type]
    assert_same(attack(model, x, y.tolist(), fit(attack, LINF)), expected)  # type: ignore[arg-type]
    assert_same(attack(model, x, y.int(), fit(attack, LINF)), expected)
    with pytest.raises(ValueError, match=r"expected a torch\.nn\.Module from inputs to logits, given a function"):
        attack(lambda z: model(z), x, y, fit(attack, LINF))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give the Sequential itself"):
        attack(model.forward, x, y, fit(attack, LINF))  # type: ignore[arg-type]


SCALED = [
    DeepFool(),
    FMN(steps=50),
    CarliniWagner(steps=12, searches=8),
    FAB(steps=10),
    DDN(steps=50),
    PGD(loss="dlr"),
]


@pytest.mark.parametrize("scale", [1e-5, 1e-12])
@pytest.mark.parametrize("attack", SCALED, ids=lambda attack: attack.name)
def test_the_scale_of_the_logits_makes_no_attack_weak(attack: Attack, scale: float) -> None:
    x, y = images()
    small = After(lambda logits: scale * logits).eval()
    assert (
        abs(
            int(attack(small, x, y, fit(attack, L2)).success.sum())
            - int(attack(network(), x, y, fit(attack, L2)).success.sum())
        )
        <= 1
    )


def test_the_evaluation_takes_every_caller() -> None:
    x, y = images()
    attacks = [PGD(steps=5), APGD(steps=5)]
    expected = evaluate(network(), x, y, LINF, attacks=attacks).table
    with torch.inference_mode():
        made_here = evaluate(network(), x.clone(), y.clone(), LINF, attacks=attacks).table
    assert made_here.equals(expected)
    given = np.asarray(x), y.tolist()
    assert evaluate(network(), *given, LINF, attacks=attacks).table.equals(expected)  # type: ignore[arg-type]
    assert evaluate(network(), x.clone().requires_grad_(), y, LINF, attacks=attacks).table.equals(expected)
    half = After(lambda logits: logits.bfloat16()).eval()
    evaluate(half, x, half(x).argmax(1), LINF, attacks=attacks, lipschitz_examples=2)
    mask = After(masked).eval()
    evaluate(mask, x, mask(x).argmax(1), LINF, attacks=attacks, lipschitz_examples=2)
