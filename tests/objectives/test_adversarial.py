"""What mixes the adversarial with the clean loss, by its formulas."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from helpers import images, small_cnn

from holdfast import Threat
from holdfast.objectives import MART, RST, AdversarialTraining, CleanPlusAdversarial, Progress

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
