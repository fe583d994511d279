"""Adversarial training, and what mixes it with the clean loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from holdfast.attacks.losses import divergence
from holdfast.fold import frozen_copy
from holdfast.objectives.objective import Loss, Progress, Searching, labels_only
from holdfast.threat import Threat


class PGDTraining(Searching):
    """What they share: the last point of PGD on the cross-entropy, in eval mode."""

    def last_of_pgd(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, start: Tensor) -> Tensor:
        """That point, (N, ...)."""
        with frozen_copy(model, x, self.steps) as copy:
            return self.climbed(
                lambda points, rows: (F.cross_entropy(copy(points), y[rows], reduction="none"), None),
                x,
                threat,
                start,
            )


class _Attacking(PGDTraining):
    random_start: bool = True
    """Start at a uniform point of the threat set; from the input itself otherwise."""

    def perturbed(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> Tensor:
        start = progress.random_points(x, threat) if self.random_start else x
        return self.last_of_pgd(model, x, y, threat, start)


class AdversarialTraining(_Attacking, name="adversarial"):
    """Cross-entropy of the inputs that PGD found (Madry et al., 2018).

    The inner PGD runs in eval mode and its last point is trained on, as in the paper.
    """

    def loss_at(
        self, model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, threat: Threat, progress: Progress
    ) -> Loss:
        total = F.cross_entropy(model(x_adv), y, reduction="none").mean()
        return Loss(total, {"adversarial_cross_entropy": total.detach()}, x_adv)


class CleanPlusAdversarial(_Attacking, name="clean-plus-adversarial"):
    """Clean cross-entropy + β · cross-entropy of what PGD found (Goodfellow et al., 2015, in other proportions).

    Both halves make one forward pass.
    """

    beta: PositiveFloat = 1.0
    """Weight of the adversarial half."""

    def loss_at(
        self, model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, threat: Threat, progress: Progress
    ) -> Loss:
        clean, perturbed = model(torch.cat([x, x_adv])).chunk(2)
        natural, robust = F.cross_entropy(clean, y), F.cross_entropy(perturbed, y)
        parts = {"cross_entropy": natural.detach(), "adversarial_cross_entropy": robust.detach()}
        return Loss(natural + self.beta * robust, parts, x_adv)


class RST(CleanPlusAdversarial, name="rst"):
    """``clean-plus-adversarial``: what the local-Lipschitz line calls RST, though without the unlabelled data of
    robust self-training (Carmon et al., 2019)."""


class MART(_Attacking, name="mart"):
    """Boosted cross-entropy of what PGD found + λ · (1 − p_y(x)) KL(p(x) ‖ p(x')) (Wang et al., 2020).

    The boosted cross-entropy is −log p_y(x') − log(1 − max_{k ≠ y} p_k(x')).
    """

    weight: NonNegativeFloat = 5.0
    """λ, the weight of the divergence between clean and perturbed answers."""

    def loss_at(
        self, model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, threat: Threat, progress: Progress
    ) -> Loss:
        clean, perturbed = model(torch.cat([x, x_adv])).chunk(2)
        own = F.one_hot(labels_only(y), clean.shape[1]).bool()
        rival = perturbed.softmax(1).masked_fill(own, 0).amax(1)
        boosted = (F.cross_entropy(perturbed, y, reduction="none") - torch.log1p(-rival.clamp(max=1 - 1e-6))).mean()
        misclassified = 1 - clean.softmax(1)[own]
        weighted = (misclassified * divergence(clean, perturbed)).mean()
        parts = {"boosted_cross_entropy": boosted.detach(), "divergence": weighted.detach()}
        return Loss(boosted + self.weight * weighted, parts, x_adv)
