"""Certified training by interval bound propagation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from holdfast.bounds import batch_statistics, interval_margins, region_of, trace
from holdfast.objectives.objective import Loss, Objective, Progress
from holdfast.threat import Threat


def robust_cross_entropy(margins: Tensor) -> Tensor:
    """log(1 + Σ_j exp(−m_j)) of each example, (N,): the cross-entropy of the worst logits.

    Args:
        margins: lower bounds of z_y − z_j for the classes j ≠ y, (N, K−1).
    """
    return F.softplus(torch.logsumexp(-margins, 1))


class IBP(Objective, name="ibp"):
    """κ · clean cross-entropy + (1 − κ) · cross-entropy of the interval bound's worst logits
    (Gowal et al., 2018).

    While training runs from ``warmup`` to ``ramp_end`` the radius grows linearly from 0 to eps and κ falls
    from 1 to ``kappa``; from there on both stay. Where the model has BatchNorm, bounds and clean pass
    share the statistics of the clean batch; Dropout does not perturb the bounds.
    """

    kappa: float = Field(default=0.5, ge=0, le=1)
    """Weight of the clean loss at the end of the ramp."""
    warmup: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training that is natural."""
    ramp_end: float = Field(default=0.5, gt=0, le=1)
    """Share of the training at which the radius has reached eps."""

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> Loss:
        if y.is_floating_point():
            raise ValueError("a certified loss needs labels, not probabilities: no mixup and no label smoothing")
        ramp = self.ramp(progress)
        kappa = 1 - ramp * (1 - self.kappa)
        with batch_statistics(model) as statistics:
            natural = F.cross_entropy(model(x), y, reduction="none").mean()
        parts = {"cross_entropy": natural.detach()}
        if kappa == 1:
            return Loss(natural, parts)
        region = region_of(x, threat.with_eps(ramp * threat.eps))
        robust = robust_cross_entropy(interval_margins(trace(model, x, statistics), region, y)).mean()
        # A term of weight 0 is left out, so that nothing is differentiated for it.
        total = kappa * natural + (1 - kappa) * robust if kappa > 0 else robust
        return Loss(total, parts | {"robust_cross_entropy": robust.detach()})

    def ramp(self, progress: Progress) -> float:
        """0 until the warm-up ends, 1 from ``ramp_end`` on, linear between."""
        length = self.ramp_end - self.warmup
        if length <= 0:
            return float(progress.fraction >= self.ramp_end)
        return min(max((progress.fraction - self.warmup) / length, 0.0), 1.0)
