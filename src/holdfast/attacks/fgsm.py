"""The fast gradient sign method."""

from __future__ import annotations

from torch import nn

from holdfast.attacks.attack import GradientAttack, Targets
from holdfast.attacks.losses import until_wrong
from holdfast.search import Ascent, Steepest, ascend
from holdfast.threat import Threat


class FGSM(GradientAttack, name="fgsm"):
    """One step of length eps along the steepest direction of the cross-entropy (Goodfellow et al., 2015).

    For l_inf that is x + eps · sign ∇_x CE; for the other norms the step of the same length in theirs.
    """

    @property
    def title(self) -> str:
        return "FGSM"

    def perturb(self, model: nn.Module, targets: Targets, threat: Threat) -> Ascent:
        return ascend(
            until_wrong(model, targets.y, samples=self.samples),
            targets.x,
            Steepest(threat, threat.eps),
            steps=1,
            start=lambda rows, restart: targets.x[rows],
            batch_size=targets.batch_size,
        )
