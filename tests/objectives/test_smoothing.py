"""Training losses of randomised smoothing, where they can be computed by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from helpers import images, small_cnn
from torch import nn

from holdfast import Threat
from holdfast.objectives import MACER, Consistency, GaussianNoise, Progress, SmoothAdv, Stability

THREAT = Threat("l2", 0.5)
PROGRESS = Progress(5, 10, seed=3)
TINY = 1e-6


def test_almost_without_noise_they_are_what_remains() -> None:
    x, y = images(16)
    model = small_cnn().eval()
    logits = model(x)
    natural = F.cross_entropy(logits, y)
    entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    for objective, expected in [
        (GaussianNoise(sigma=TINY), natural),
        (SmoothAdv(sigma=TINY, steps=1, step_size=1e-9, ramp_end=0), natural),
        (Consistency(sigma=TINY, entropy=0.5), natural + 0.5 * entropy),
        (Stability(sigma=TINY, weight=2), natural + 2 * entropy),
        (MACER(sigma=TINY, weight=0), natural),
    ]:
        assert torch.allclose(objective.loss(model, x, y, THREAT, PROGRESS).total, expected, atol=1e-4)


def test_noise_has_its_deviation_and_is_drawn_anew_at_every_step() -> None:
    seen: list[torch.Tensor] = []

    class Spy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return x.flatten(1)

    x, y = torch.full((200, 1, 10, 10), 0.5), torch.zeros(200, dtype=torch.int64)
    for step in (0, 0, 1):
        GaussianNoise(sigma=0.3).loss(Spy(), x, y, THREAT, Progress(step, 10, seed=1))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert abs((seen[0] - x).std().item() - 0.3) < 0.01
    assert seen[0].min() < 0  # nothing is clipped


def test_smooth_adv_raises_the_smoothed_loss() -> None:
    x, y = images(32)
    model = small_cnn().eval()
    objective = SmoothAdv(sigma=0.1, copies=4, steps=8, ramp_end=0)
    attacked = objective.loss(model, x, y, THREAT, PROGRESS)
    natural = objective.loss(model, x, y, THREAT.with_eps(0), PROGRESS)
    assert attacked.total > natural.total + 0.02
    assert (THREAT.distance(x, attacked.x_adv) <= THREAT.eps + 1e-6).all()


def test_macer_s_hinge_by_the_formula() -> None:
    x, y = images(8)
    model = small_cnn().eval()
    objective = MACER(sigma=0.05, copies=4, weight=3, gamma=8, beta=2)
    noise = objective.noise(x, 4, PROGRESS)
    logits = model(x.repeat(4, 1, 1, 1) + noise).view(4, 8, -1)
    expected = -logits.softmax(2).mean(0)[torch.arange(8), y].log().mean()
    soft = (2 * logits).softmax(2).mean(0)
    normal = torch.distributions.Normal(0.0, 1.0)
    for row in range(8):
        first, second = soft[row].topk(2).values
        if soft[row].argmax() == y[row]:
            lead = normal.icdf(first) - normal.icdf(second)
            expected = expected + 3 * 0.05 / 2 * max(0.0, 8 - lead.item()) / 8
    assert torch.allclose(objective.loss(model, x, y, THREAT, PROGRESS).total, expected, atol=1e-4)
