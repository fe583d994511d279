"""Single-step training and free adversarial training, step by step."""

from __future__ import annotations

import pickle

import torch
import torch.nn.functional as F
from helpers import images, small_cnn

from holdfast import Threat
from holdfast.objectives import FastAT, FreeAT, Progress

THREAT, PROGRESS = Threat("linf", 0.1), Progress(2, 10, seed=1)


def test_one_step_from_a_random_start() -> None:
    x, y = images(12)
    model = small_cnn().eval()
    loss = FastAT().loss(model, x, y, THREAT, PROGRESS)
    start = PROGRESS.random_points(x, THREAT).requires_grad_(True)
    sign = torch.autograd.grad(F.cross_entropy(model(start), y), start)[0].sign()
    moved = (start.detach() + 0.125 * sign).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    assert torch.allclose(loss.x_adv, moved, atol=1e-6)
    wide = FastAT(start="wide", step_size=1.0).loss(model, x, y, THREAT, PROGRESS)
    assert 0.1 < THREAT.distance(x, wide.x_adv).max() <= 0.3 + 1e-6
    aligned = FastAT(grad_align=0.5).loss(model, x, y, THREAT, PROGRESS)
    a, b = (
        torch.autograd.grad(F.cross_entropy(model(p), y, reduction="sum"), p)[0].flatten(1)
        for p in (x.clone().requires_grad_(True), start)
    )
    misalignment = (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean()
    assert torch.allclose(aligned.total, loss.total + 0.5 * misalignment, atol=1e-5)
    assert aligned.total.requires_grad


def test_a_replay_moves_by_the_gradient_of_the_step_before() -> None:
    x, y = images(12)
    model = small_cnn().eval()
    free = FreeAT(replays=3)
    first = free.loss(model, x, y, THREAT, Progress(3, 12, seed=1))
    assert torch.equal(first.x_adv, Progress(3, 12, seed=1).random_points(x, THREAT))
    points = first.x_adv.clone().requires_grad_(True)
    sign = torch.autograd.grad(F.cross_entropy(model(points), y), points)[0].sign()
    first.total.backward()
    second = free.loss(model, x, y, THREAT, Progress(4, 12, seed=1))
    expected = (first.x_adv + 0.1 * sign).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    assert torch.allclose(second.x_adv, expected, atol=1e-6)
    second.total.backward()
    third = free.loss(model, x, y, THREAT, Progress(5, 12, seed=1))
    assert not torch.equal(third.x_adv, second.x_adv)
    fresh = free.loss(model, x, y, THREAT, Progress(6, 12, seed=1)).x_adv  # another batch
    assert torch.equal(fresh, Progress(6, 12, seed=1).random_points(x, THREAT))
    assert pickle.loads(pickle.dumps(free)) is not None  # as a pool of processes hands it on
