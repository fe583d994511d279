"""The contract of every registered attack."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import Trace, images, linear_model, linear_radius, small_cnn
from torch import nn

from holdfast import Threat
from holdfast.attacks import Attack

ATTACKS = sorted(Attack.registry)
NORMS = Threat.norms

every_attack = pytest.mark.parametrize("attack", [Attack.registry[name]() for name in ATTACKS], ids=ATTACKS)
every_norm = pytest.mark.parametrize("norm", NORMS)
RADII = {"linf": 0.2, "l2": 1.0, "l1": 5.0}


@every_attack
@every_norm
def test_stays_in_the_threat_set_and_reports_what_it_did(attack: Attack, norm: str) -> None:
    model, (x, y), threat = small_cnn().eval(), images(20), Threat(norm, RADII[norm])
    result = attack(model, x, y, threat)
    assert result.x_adv.shape == x.shape
    assert (threat.distance(x, result.x_adv) <= threat.eps + 1e-5).all()
    assert (result.x_adv >= 0).all()
    assert (result.x_adv <= 1).all()
    assert torch.equal(result.success, model(result.x_adv).argmax(1) != y)
    assert torch.allclose(result.distance, threat.distance(x, result.x_adv))
    wrong = model(x).argmax(1) != y
    assert 0 < wrong.sum() < len(y)
    assert result.success[wrong].all()
    assert (result.distance[wrong] == 0).all()
    assert (result.forwards[wrong] == 1).all()
    assert (result.backwards[wrong] == 0).all()
    assert (result.backwards[~wrong] > 0).all()


@every_attack
def test_leaves_no_trace_on_the_model_or_the_inputs(attack: Attack) -> None:
    model, (x, y) = small_cnn().train(), images(6)
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[6].weight.grad = torch.ones_like(model[6].weight)
    before, trace = x.clone(), Trace(model)
    attack(model, x, y, Threat("linf", 0.1))
    trace.check()
    assert torch.equal(x, before)
    assert not x.requires_grad


@every_attack
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


@every_attack
@every_norm
def test_breaks_a_linear_model_exactly_when_eps_exceeds_the_radius(attack: Attack, norm: str) -> None:
    model = linear_model(classes=2).double()  # with more, the steepest loss need not lead to the nearest boundary
    x = torch.rand(30, 1, 2, 3, dtype=torch.float64)
    y = model(x).argmax(1)
    for i, radius in enumerate(linear_radius(model, x, y, norm).tolist()):
        for factor, broken in ((0.99, False), (1.03, True)):
            result = attack(model, x[[i]], y[[i]], Threat(norm, factor * radius, -math.inf, math.inf))
            assert result.success.item() == broken


@every_attack
def test_single_non_contiguous_and_border_inputs(attack: Attack) -> None:
    model, (x, y) = small_cnn(), images(4)
    turned = x.transpose(2, 3)
    straight = attack(model, turned.contiguous(), y, Threat("linf", 0.1))
    assert torch.equal(attack(model, turned, y, Threat("linf", 0.1)).x_adv, straight.x_adv)
    assert len(attack(model, x[:1], y[:1], Threat("linf", 0.1)).x_adv) == 1
    assert len(attack(model, x[:0], y[:0], Threat("linf", 0.1)).x_adv) == 0
    assert torch.equal(attack(model, x, y, Threat("linf", 0.0)).x_adv, x)
    black = torch.zeros_like(x)
    assert (attack(model, black, y, Threat("l2", 1.0)).x_adv >= 0).all()


@every_attack
def test_models_that_answer_nonsense_are_refused(attack: Attack) -> None:
    class Nan(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, :4] * torch.nan

    x, y = images(4)
    with pytest.raises(FloatingPointError, match="not finite"):
        attack(Nan(), x, y, Threat("linf", 0.1))
    with pytest.raises(ValueError, match="label"):
        attack(small_cnn(classes=2), x, torch.full((4,), 2), Threat("linf", 0.1))
    with pytest.raises(ValueError, match="box"):
        attack(small_cnn(), x * 2, y, Threat("linf", 0.1))


@every_attack
def test_a_constant_model_is_never_broken(attack: Attack) -> None:
    class Constant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[1.0, 0.0]]).expand(len(x), 2)

    x, _ = images(3)
    result = attack(Constant(), x, torch.tensor([0, 0, 1]), Threat("linf", 0.5))
    assert result.success.tolist() == [False, False, True]
