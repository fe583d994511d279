"""The default attack: as strong as its budget allows, and as cheap as it says."""

from __future__ import annotations

import pytest
import torch
from helpers import images, linear_model, linear_radius, small_cnn

from holdfast import Threat
from holdfast.attacks import PGD, Attack, AutoAttack, Ladder, default_attack
from holdfast.attacks.ladder import Budget

MOST: dict[Budget, int] = {"quick": 30, "standard": 130, "thorough": 600}


@pytest.mark.parametrize("budget", MOST)
def test_a_budget_is_the_forwards_of_an_example_that_stands(budget: Budget) -> None:
    model, (x, _) = small_cnn().eval(), images(6)
    y = model(x).argmax(1)
    found = default_attack(budget)(model, x, y, Threat("linf", 1e-6))
    assert not found.success.any()
    assert (found.forwards <= MOST[budget]).all()
    assert (found.forwards >= 0.9 * MOST[budget]).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_it_finds_what_a_linear_model_gives_away(norm: str) -> None:
    model, (x, _) = linear_model(classes=5, shape=(1, 6, 6)), images(40)
    x = x[:, :, :6, :6].contiguous()
    y = model(x).argmax(1)
    radius = linear_radius(model, x, y, norm)
    eps = radius.median().item()
    found = Ladder()(model, x, y, Threat(norm, eps, -torch.inf, torch.inf))
    clear = (radius - eps).abs() > 0.05 * eps
    assert (found.success == (radius <= eps))[clear].all()


def test_it_is_no_weaker_than_pgd_and_leaves_little_to_autoattack() -> None:
    model, (x, _) = small_cnn().eval(), images(40)
    y = model(x).argmax(1)
    threat = Threat("linf", 0.03)
    standing = {
        attack.name: int((~attack(model, x, y, threat).success).sum())
        for attack in (Ladder(), PGD(), AutoAttack(version="quick"))
    }
    assert 0 < standing["ladder"] < 40
    assert standing["ladder"] <= min(standing["pgd"], standing["autoattack"] + 1)


def test_the_ladder_is_what_nobody_chose() -> None:
    assert default_attack() == Attack.parse("ladder") == Ladder(budget="standard")
    with pytest.raises(ValueError, match="quick"):
        Ladder(budget="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", ["linf", "l0"])
def test_averaged_gradients_cost_so_many_times_the_budget(norm: str) -> None:
    model, (x, _) = small_cnn().eval(), images(6)
    y = model(x).argmax(1)
    threat = Threat(norm, 1e-6)
    once, thrice = (Ladder(budget="quick", samples=samples)(model, x, y, threat) for samples in (1, 3))
    assert (once.forwards > 20).all()
    assert torch.equal(thrice.forwards - 1, 3 * (once.forwards - 1))  # the clean one is one
    assert torch.equal(thrice.backwards, 3 * once.backwards)


def test_in_l0_it_is_sigma_zero_and_vectors_are_attacked_as_hard_as_images() -> None:
    model, (x, _) = small_cnn().eval(), images(8)
    y = model(x).argmax(1)
    found = Ladder(budget="quick")(model, x, y, Threat("l0", 40))
    assert found.success.any()
    assert {text.split()[0] for text in found.origin if text} == {"sigma-zero"}
    assert (found.forwards <= 30).all()
    flat = torch.nn.Sequential(torch.nn.Unflatten(1, x.shape[1:]), model)
    vectors = Ladder(budget="thorough")(flat, x.flatten(1), y, Threat("linf", 1e-6))
    assert (vectors.forwards <= MOST["thorough"]).all()
    assert (vectors.forwards >= 0.9 * MOST["thorough"]).all()
