"""Losses for networks whose Lipschitz constant is known: the margin in the logits is the certificate."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from holdfast.component import Number, PositiveNumber
from holdfast.objectives.objective import Loss, Objective, Progress, labels_only
from holdfast.threat import Threat


def offset_cross_entropy(logits: Tensor, y: Tensor, offset: float, temperature: float) -> Tensor:
    """t · CE((z − o e_y) / t, y) of each example, (N,) (Prach & Lampert, 2022).

    Args:
        y: labels (N,), or probabilities (N, K), which weigh the offset.
    """
    own = y if y.is_floating_point() else F.one_hot(y, logits.shape[1]).to(logits)
    return temperature * F.cross_entropy((logits - offset * own) / temperature, y, reduction="none")


def logit_margins(logits: Tensor, y: Tensor) -> Tensor:
    """z_y − max_{j ≠ y} z_j, (N,)."""
    own = F.one_hot(labels_only(y), logits.shape[1]).bool()
    return torch.where(own, logits, 0).sum(1) - logits.masked_fill(own, -math.inf).amax(1)  # no mask: it would wait


class OffsetCrossEntropy(Objective, name="offset-cross-entropy"):
    """t · CE((z − o e_y) / t, y): the true class wins once it leads by the offset (Prach & Lampert, 2022).

    The offset √2 r asks for the radius r of a 1-Lipschitz network; a small temperature cares little for more.
    """

    offset: Number = math.sqrt(2) * 36 / 255
    """o, the lead over the other logits that is asked for, in logits."""
    temperature: PositiveNumber = 0.25
    """t, the temperature, in logits: the smaller, the less counts what leads by more."""

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> Loss:
        total = offset_cross_entropy(model(x), y, self.offset, self.temperature).mean()
        return Loss(total, {"offset_cross_entropy": total.detach()})


class LogitAnnealing(Objective, name="logit-annealing"):
    """−t (1 − p_y)^γ log p_y with p = softmax((z − o e_y) / t): what leads by more than the offset counts less and
    less, so that a network of little capacity spends it on what it can still win (Lai et al., 2025)."""

    offset: Number = 2 * math.sqrt(2) * 36 / 255
    """o, the lead over the other logits that is asked for, in logits."""
    temperature: PositiveNumber = 0.75
    """t, the temperature, in logits."""
    gamma: NonNegativeFloat = 5.0
    """γ, how fast the loss of what is right dies away; at 0 this is ``offset-cross-entropy``."""

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> Loss:
        plain = offset_cross_entropy(model(x), labels_only(y), self.offset, self.temperature)
        wrong = -torch.expm1(-plain / self.temperature)  # 1 − p_y
        wrong = wrong.clamp(min=torch.finfo(wrong.dtype).tiny)  # roots have no slope at 0
        total = (wrong**self.gamma * plain).mean()
        return Loss(total, {"annealed_cross_entropy": total.detach()})


class MarginHinge(Objective, name="margin-hinge"):
    """max(0, m − (z_y − max_j z_j)): nothing beyond the margin counts (Anil et al., 2019)."""

    margin: PositiveNumber = 2 * math.sqrt(2) * 36 / 255
    """m, the margin beyond which nothing counts, in logits."""

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> Loss:
        total = (self.margin - logit_margins(model(x), y)).clamp(min=0).mean()
        return Loss(total, {"hinge": total.detach()})


class CertificateRegularisation(Objective, name="certificate-regularisation"):
    """Cross-entropy − γ · max(0, margin) / √2: certified radii shall grow (Singla et al., 2022)."""

    gamma: NonNegativeFloat = 0.5
    """γ, the reward of a radius, per input unit."""

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> Loss:
        logits = model(x)
        natural = F.cross_entropy(logits, y)
        radius = (logit_margins(logits, y).clamp(min=0) / math.sqrt(2)).mean()
        return Loss(natural - self.gamma * radius, {"cross_entropy": natural.detach(), "radius": radius.detach()})
