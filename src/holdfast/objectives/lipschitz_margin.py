"""Certified training in l_2 by Lipschitz constants: BCP, LMT, GloRo, EMMA."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from holdfast.bounds import robust_cross_entropy
from holdfast.bounds.ball import ball_centre, ball_radii, centred_ball_margins, centred_lipschitz_margins
from holdfast.bounds.carried import saved_vectors
from holdfast.bounds.gains import Gains, estimated_gains
from holdfast.bounds.operators import run
from holdfast.bounds.tail import tail_of
from holdfast.objectives.certified import Batch, CertifiedTraining, Robust


class _PowerIteration(CertifiedTraining):
    """What they share: operator norms by power iteration, in a training from where the step before ended.

    That they come from below does no harm in a loss; certificates take upper bounds.
    """

    power_iterations: PositiveInt = 10
    """Per layer in the first step, and wherever the loss is asked outside of a training."""
    further_iterations: PositiveInt = 1
    """Per layer in each later step."""

    def gains(self, batch: Batch) -> Gains:
        saved, further = saved_vectors(), self.further_iterations
        return estimated_gains(batch.graph, batch.x, self.power_iterations, saved=saved, further=further)

    def reach(self, batch: Batch, logits: Tensor, own: Tensor) -> Tensor:
        """r ‖W_j − W_k‖₂, by how much z_j − z_k may change within the radius, (N, K).

        Args:
            own: the classes k, one-hot, (N, K).
        """
        radii = ball_radii(batch.graph, batch.region, self.gains(batch))
        reach = torch.zeros_like(logits)
        for source, matrix in tail_of(batch.graph, batch.x).matrices(logits).items():
            distance = torch.cdist(own @ matrix, matrix, compute_mode="donot_use_mm_for_euclid_dist")
            reach = reach + radii[source][:, None] * distance
        return reach


class BCP(_PowerIteration, name="bcp"):
    """Cross-entropy of the worst logits over balls cut with boxes (Lee et al., 2020).

    The worst translation is exact; the original stops after one round of clipping, and its κ ends below 0.
    """

    meets_inputs: ClassVar[bool] = True

    def robust(self, batch: Batch) -> Robust:
        bound, margins = centred_ball_margins(batch.graph, batch.region, batch.y, self.gains(batch))
        return Robust(robust_cross_entropy(bound.lower), margins=margins)


class LMT(_PowerIteration, name="lmt"):
    """Lipschitz-margin training (Tsuzuku et al., 2018) in its pairwise form: the cross-entropy of z_y and
    z_j + r ‖W_j − W_y‖₂, r the radius times the operator norms before the last layer."""

    meets_inputs: ClassVar[bool] = True

    def robust(self, batch: Batch) -> Robust:
        bound, margins = centred_lipschitz_margins(batch.graph, batch.region, batch.y, self.gains(batch))
        return Robust(robust_cross_entropy(bound.lower), margins=margins)


class GloRo(_PowerIteration, name="gloro"):
    """Cross-entropy with one class more, for what is not certified (Leino et al., 2021): its logit is
    max_{j ≠ k} z_j + r ‖W_j − W_k‖₂, k the predicted class."""

    def robust(self, batch: Batch) -> Robust:
        logits = run(batch.graph, ball_centre(batch.region))
        own = F.one_hot(logits.argmax(1), logits.shape[1]).to(logits)
        rivals = (logits + self.reach(batch, logits, own)).masked_fill(own.bool(), -torch.inf)
        extended = torch.cat([logits, rivals.amax(1, keepdim=True)], 1)
        return Robust(F.cross_entropy(extended, batch.y, reduction="none"))


class EMMA(_PowerIteration, name="emma"):
    """Cross-entropy of z_y and z_j + ε_j ‖W_j − W_y‖₂ with ε_j ≤ r just large enough that class j draws level
    (Hu et al., 2023): ε_j ‖W_j − W_y‖₂ = min(max(z_y − z_j, 0), r ‖W_j − W_y‖₂), ε_j without gradient.

    What is certified already pushes no further than to the boundary, so that no single rival rules the loss.
    """

    def robust(self, batch: Batch) -> Robust:
        logits = run(batch.graph, ball_centre(batch.region))
        own = F.one_hot(batch.y, logits.shape[1]).to(logits)
        reach = self.reach(batch, logits, own)
        with torch.no_grad():
            lead = (logits * own).sum(1, keepdim=True) - logits
            share = (lead / reach.clamp(min=torch.finfo(reach.dtype).tiny)).clamp(0, 1)
        return Robust(F.cross_entropy(logits + share * reach, batch.y, reduction="none"))
