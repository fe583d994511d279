"""Adversarial weight perturbation against weights that are moved by hand."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import images, small_cnn
from torch import nn

from holdfast import Threat
from holdfast.layers import CPLConv2d, MaxMin
from holdfast.objectives import (
    AWP,
    CURE,
    IBP,
    MMA,
    MTLIBP,
    TRADES,
    TULIP,
    AdversarialTraining,
    CrossEntropy,
    Objective,
    Progress,
    SmoothAdv,
)
from holdfast.objectives.objective import Perturbing

THREAT, PROGRESS = Threat("linf", 0.1), Progress(2, 10, seed=1)


def test_the_loss_and_its_gradient_are_those_of_the_moved_weights() -> None:
    x, y = images(12)
    model, moved = small_cnn().eval(), small_cnn().eval()
    loss = AWP(gamma=0.05).loss(model, x, y, THREAT, PROGRESS)
    plain = AdversarialTraining().loss(model, x, y, THREAT, PROGRESS)
    assert torch.equal(loss.x_adv, plain.x_adv)
    assert torch.allclose(loss.parts["unperturbed"], plain.total)
    gradients = torch.autograd.grad(plain.total, list(model.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(moved.parameters(), gradients, strict=True):
            if parameter.dim() > 1:
                parameter += 0.05 * parameter.norm() * gradient / gradient.norm()
    there = F.cross_entropy(moved(loss.x_adv), y)
    assert torch.allclose(loss.total, there, atol=1e-6)
    assert loss.total > plain.total
    there.backward()
    for own, other in zip(
        torch.autograd.grad(loss.total, list(model.parameters())), moved.parameters(), strict=True
    ):
        assert torch.allclose(own, other.grad, atol=1e-6)


@pytest.mark.parametrize("inner", [CrossEntropy(), TRADES(steps=2), IBP()], ids=lambda o: o.name)
def test_it_wraps_any_objective_and_leaves_no_trace(inner: Objective) -> None:
    x, y = images(12)
    model = small_cnn().train()
    before = copy.deepcopy(model.state_dict())
    loss = AWP(objective=inner, gamma=0.02).loss(model, x, y, THREAT, PROGRESS)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    assert model[1].num_batches_tracked == 1  # of the forward that counts
    loss.total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    later = AWP(objective=inner, begin=0.5).loss(model.eval(), x, y, THREAT, PROGRESS)
    assert torch.equal(later.total, inner.loss(model, x, y, THREAT, PROGRESS).total)


WRAPPED = [name for name in sorted(Objective.registry) if name not in ("awp", "free-at")]


@pytest.mark.parametrize("name", WRAPPED)
def test_it_wraps_every_registered_objective(name: str) -> None:
    x, y = images(12)
    model = small_cnn().train()
    loss = AWP(objective=Objective.registry[name]()).loss(model, x, y, THREAT, PROGRESS)
    assert torch.isfinite(loss.total)
    loss.total.backward()
    assert model[1].num_batches_tracked == 1


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_what_a_search_finds_at_the_weights_serves_both_passes(name: str, norm: str) -> None:
    x, y = images(12)
    inner, model = Objective.registry[name](), small_cnn().train()
    threat, late = Threat(norm, {"linf": 0.1, "l2": 0.5}[norm]), Progress(9, 10, seed=1)
    plain = inner.loss(small_cnn().train(), x, y, threat, late)
    wrapped = AWP(objective=inner, gamma=0.1).loss(model, x, y, threat, late)
    assert (plain.x_adv is None) == (wrapped.x_adv is None)
    if plain.x_adv is not None:
        assert torch.equal(wrapped.x_adv, plain.x_adv)


@pytest.mark.parametrize("inner", [MMA(), SmoothAdv(ramp_end=0), TULIP(), CURE(), MTLIBP()], ids=lambda o: o.name)
def test_the_second_pass_is_the_loss_at_the_moved_weights_of_what_was_found_before(inner: Perturbing) -> None:
    x, y = images(12)
    model, moved = small_cnn().eval(), small_cnn().eval()
    late = Progress(9, 10, seed=1)
    found = inner.perturbed(model, x, y, THREAT, late)
    total = AWP(objective=inner, gamma=0.1).loss(model, x, y, THREAT, late).total
    weights = [parameter for parameter in moved.parameters() if parameter.dim() > 1]
    gradients = torch.autograd.grad(inner.loss_at(moved, x, y, found, THREAT, late).total, weights)
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            weight += 0.1 * weight.norm() * gradient / gradient.norm()
    assert torch.allclose(total, inner.loss_at(moved, x, y, found, THREAT, late).total, rtol=1e-4)


def test_both_passes_drop_the_same_units() -> None:
    x, y = images(12)
    model, plain = small_cnn(batch_norm=False).train(), small_cnn(batch_norm=False).train()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        loss = AWP(objective=CrossEntropy(), gamma=1e-9).loss(model, x, y, THREAT, PROGRESS)
        after = torch.get_rng_state()
        torch.manual_seed(3)
        assert torch.allclose(CrossEntropy().loss(plain, x, y, THREAT, PROGRESS).total, loss.total, atol=1e-5)
        assert torch.equal(torch.get_rng_state(), after)
    assert torch.allclose(loss.parts["unperturbed"], loss.total, atol=1e-5)


def test_layers_that_remember_more_than_buffers_are_left_alone_and_replays_are_refused() -> None:
    x, y = images(12)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(CPLConv2d(1, 4), MaxMin(), nn.Flatten(), nn.Linear(256, 4)).train()
    other = copy.deepcopy(model)
    AWP(objective=CrossEntropy(), gamma=1e-9).loss(model, x, y, THREAT, PROGRESS)
    CrossEntropy().loss(other, x, y, THREAT, PROGRESS)
    before, after = (module[0].get_extra_state() for module in (other, model))
    assert torch.allclose(torch.as_tensor(before), torch.as_tensor(after), atol=1e-6)
    with pytest.raises(ValueError, match="free-at replays its batches"):
        Objective.parse({"name": "awp", "objective": "free-at"})


def test_as_a_recipe_writes_it() -> None:
    awp = Objective.parse({"name": "awp", "objective": {"name": "trades", "beta": 3}, "gamma": "1/100"})
    assert isinstance(awp, AWP)
    assert awp.objective == TRADES(beta=3)
    assert Objective.parse(awp.model_dump()) == awp
