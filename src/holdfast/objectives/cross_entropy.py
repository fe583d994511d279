"""Natural training."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.objectives.objective import Loss, Objective, Progress
from holdfast.threat import Threat


class CrossEntropy(Objective, name="cross-entropy"):
    """Natural training: cross-entropy of the unperturbed inputs."""

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> Loss:
        total = F.cross_entropy(model(x), y, reduction="none").mean()
        return Loss(total, {"cross_entropy": total.detach()})
