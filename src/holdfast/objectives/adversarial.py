"""Adversarial training."""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from holdfast.attacks.fold import folded
from holdfast.inference import frozen_eval
from holdfast.objectives.objective import Loss, Objective, Progress
from holdfast.search import climb
from holdfast.threat import Threat


class AdversarialTraining(Objective, name="adversarial"):
    """Cross-entropy of the inputs that PGD found (Madry et al., 2018).

    The inner PGD runs in eval mode and its last point is trained on, as in the paper.
    """

    steps: PositiveInt = 10
    """Steps of the inner PGD."""
    step_size: PositiveFloat = 0.25
    """Length of a step in units of eps."""
    random_start: bool = True
    """Start at a uniform point of the threat set; from the input itself otherwise."""

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> Loss:
        with frozen_eval(model):
            copy = folded(model, x[:2])
            x_adv = climb(
                lambda points, rows: (F.cross_entropy(copy(points), y[rows], reduction="none"), None),
                x,
                threat,
                steps=self.steps,
                step_size=self.step_size * threat.eps,
                start=progress.random_points(x, threat) if self.random_start else x,
            )
        total = F.cross_entropy(model(x_adv), y, reduction="none").mean()
        return Loss(total, {"adversarial_cross_entropy": total.detach()}, x_adv)
