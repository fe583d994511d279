"""What mixes the adversarial with the clean loss, by its formulas."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from helpers import images, small_cnn

from holdfast import Threat
from holdfast.objectives import MART, RST, AdversarialTraining, CleanPlusAdversarial, FastAT, Progress

THREAT, PROGRESS = Threat("linf", 0.1), Progress(2, 10, seed=1)


def test_the_mixture_is_the_sum_of_its_parts() -> None:
    x, y = images(12)
    model = small_cnn().eval()
    adversarial = AdversarialTraining().loss(model, x, y, THREAT, PROGRESS)
    mixed = CleanPlusAdversarial(beta=0.5).loss(model, x, y, THREAT, PROGRESS)
    assert torch.equal(mixed.x_adv, adversarial.x_adv)
    assert torch.allclose(mixed.total, F.cross_entropy(model(x), y) + 0.5 * adversarial.total, atol=1e-6)
    assert torch.equal(RST(beta=0.5).loss(model, x, y, THREAT, PROGRESS).total, mixed.total)


def test_mart_by_its_formula() -> None:
    x, y = images(12)
    model = small_cnn().eval()
    loss = MART(weight=5.0).loss(model, x, y, THREAT, PROGRESS)
    p, q = model(x).softmax(1), model(loss.x_adv).softmax(1)
    total = torch.zeros(())
    for row, label in enumerate(y.tolist()):
        rival = max(q[row, k].item() for k in range(4) if k != label)
        divergence = (p[row] * (p[row].log() - q[row].log())).sum()
        total = (
            total - q[row, label].log() - torch.log(torch.tensor(1 - rival)) + 5 * (1 - p[row, label]) * divergence
        )
    assert torch.allclose(loss.total, total / 12, atol=1e-5)


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
