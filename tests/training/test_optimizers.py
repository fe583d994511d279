"""Optimisers: groups of parameters, and the rate that the schedule sets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import small_cnn

from holdfast.training import SGD, Adam, Optimizer, RAdam
from holdfast.training.optimizers import set_rate

EVERY = sorted(Optimizer.registry)


@pytest.mark.parametrize("name", EVERY)
def test_every_optimizer_lowers_a_loss(name: str) -> None:
    model = torch.nn.Linear(3, 1)
    optimizer = Optimizer.parse({"name": name, "lr": 0.01, "weight_decay": 0.01}).build(model)
    x = torch.randn(20, 3)
    losses = []
    for _ in range(30):
        loss = (model(x) - x.sum(1, keepdim=True)).pow(2).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_norms_and_biases_can_be_spared_the_decay() -> None:
    model = small_cnn()
    whole = SGD(weight_decay=0.1).build(model)
    assert [group["weight_decay"] for group in whole.param_groups] == [0.1]
    split = SGD(weight_decay=0.1, decay_norm_and_bias=False).build(model)
    decaying, spared = split.param_groups
    assert [p.dim() for p in decaying["params"]] == [4, 2]
    assert len(spared["params"]) == 4
    assert (decaying["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert len(decaying["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_the_schedule_sets_rate_and_momentum_of_every_group() -> None:
    sgd = SGD(decay_norm_and_bias=False, momentum=0.9).build(small_cnn())
    set_rate(sgd, 0.5, None)
    assert [(g["lr"], g["momentum"]) for g in sgd.param_groups] == [(0.5, 0.9)] * 2
    set_rate(sgd, 0.5, 0.8)
    assert [g["momentum"] for g in sgd.param_groups] == [0.8] * 2
    adam = Adam().build(small_cnn())
    set_rate(adam, 0.1, 0.85)
    assert adam.param_groups[0]["betas"] == (0.85, 0.999)


def test_looking_ahead_returns_half_the_way(tmp_path: Path) -> None:
    """Two steps of gradient 1 from 0, then half the way back, and again; also where it is stored in between."""
    values, weight = [], torch.nn.Parameter(torch.zeros(1))
    model = torch.nn.ParameterList([weight])
    optimizer = SGD(lr=1.0, momentum=0.0, lookahead=2).build(model)
    for step in range(5):
        weight.grad = torch.ones(1)
        optimizer.step()
        values.append(weight.item())
        if step == 2:
            torch.save(optimizer.state_dict(), tmp_path / "state.pt")
            optimizer = SGD(lr=1.0, momentum=0.0, lookahead=2).build(model)
            optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert values == [-1.0, -1.0, -2.0, -2.0, -3.0]
    assert RAdam(lookahead=6).lookahead == 6
