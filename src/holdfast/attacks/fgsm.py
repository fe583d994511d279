"""The fast gradient sign method."""

from __future__ import annotations

from torch import Tensor, nn

from holdfast.attacks.attack import Attack, cross_entropy_until_wrong
from holdfast.search import Ascent, ascend
from holdfast.threat import Threat


class FGSM(Attack, name="fgsm"):
    """One step of length eps along the steepest direction of the cross-entropy (Goodfellow et al., 2015).

    For l_inf that is x + eps · sign ∇_x CE; for the other norms the step of the same length in theirs.
    """

    @property
    def title(self) -> str:
        return "FGSM"

    def perturb(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        seed: int,
        indices: Tensor,
        batch_size: int,
    ) -> Ascent:
        return ascend(
            cross_entropy_until_wrong(model, y),
            x,
            threat,
            steps=1,
            step_size=threat.eps,
            start=lambda rows, restart: x[rows],
            batch_size=batch_size,
        )
