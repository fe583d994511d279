"""Certified training by linear relaxation: CROWN-IBP, the one-step relaxation, the convex dual."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from holdfast.bounds import robust_cross_entropy
from holdfast.bounds.linear import Sweep, relaxed_at, sweep
from holdfast.bounds.optimised import one_step_slopes
from holdfast.bounds.projected import projected_intervals
from holdfast.bounds.relaxation import SlopeRule, slopes_by
from holdfast.bounds.specification import fused_robust_sum, interval_margins_at, linear_margins
from holdfast.draws import Draws
from holdfast.inference import mix_seed
from holdfast.objectives.certified import Batch, CertifiedTraining, Robust


class _Relaxed(CertifiedTraining):
    """What the two with interval bounds on the way share: a mix of linear and interval bounds, and loss fusion."""

    beta: float = Field(default=0.0, ge=0, le=1)
    """Weight of the linear bound at the end of the ramp; the interval bound has the rest."""
    start_beta: float = Field(default=1.0, ge=0, le=1)
    """Weight of the linear bound at the start."""
    fused: bool = False
    """Bound Σ exp(−margin) by one linear function of the logits, in one backward pass in place of one for each
    other class (Xu et al., 2020): a fraction of the time, and hardly better than intervals where these are wide."""

    def mixed(self, batch: Batch, done: Sweep) -> Tensor:
        """The robust cross-entropy of a sweep's bounds, (N,)."""
        beta = self.start_beta + batch.ramp * (self.beta - self.start_beta)
        margins = interval_margins_at(batch.graph, batch.region, done.values, batch.y).lower
        if beta == 0:
            return robust_cross_entropy(margins)
        if not self.fused:
            linear = linear_margins(batch.graph, batch.region, done, batch.y).lower
            return robust_cross_entropy(beta * linear + (1 - beta) * margins)
        total, shift = fused_robust_sum(batch.graph, batch.region, done, batch.y)
        total = beta * total + (1 - beta) * (-margins - shift[:, None]).exp().sum(1)
        return F.softplus(total.clamp(min=torch.finfo(total.dtype).tiny).log() + shift)


class CROWNIBP(_Relaxed, name="crown-ibp"):
    """Cross-entropy of worst margins by one linear backward pass on interval bounds (Zhang et al., 2020).

    As the radius grows, the linear bound gives way to the interval bound.
    """

    relaxation: SlopeRule = "adaptive"
    """Slope of the line below an unstable ReLU."""

    def robust(self, batch: Batch) -> Robust:
        slopes = slopes_by(self.relaxation, mix_seed(batch.progress.seed, batch.progress.step))
        done = sweep(batch.graph, batch.region, slopes)
        return Robust(self.mixed(batch, done), done.values)


class OneStepRelaxation(_Relaxed, name="one-step-relaxation"):
    """CROWN-IBP whose lower slopes are chosen for this very loss (Lee et al., 2021): random ones, then one signed
    gradient step of length 2, cut to [0, 1]."""

    beta: float = Field(default=1.0, ge=0, le=1)
    """Weight of the linear bound at the end of the ramp; the interval bound has the rest."""

    def robust(self, batch: Batch) -> Robust:
        seed = mix_seed(batch.progress.seed, batch.progress.step)
        slopes = one_step_slopes(
            batch.graph, batch.region, batch.y, seed, loss=lambda done: self.mixed(batch, done)
        )
        done = sweep(batch.graph, batch.region, slopes)
        return Robust(self.mixed(batch, done), done.values)


class CAP(CertifiedTraining, name="cap"):
    """Cross-entropy of the worst margins of the convex outer polytope (Wong & Kolter, 2018): linear backward passes
    from every neuron, with the slopes u / (u − l)."""

    projections: PositiveInt | None = None
    """Estimate the widths of hidden values by so many random projections in place of a pass from each neuron (Wong
    et al., 2018, who take 50): the loss is about a bound then, and no longer one. Exact by default, which is for
    small networks."""

    def robust(self, batch: Batch) -> Robust:
        graph, region = batch.graph, batch.region
        if self.projections is None:
            done = sweep(graph, region, slopes_by("same-slope"), tighten=True)
        else:
            draws = Draws.of(batch.progress.seed, batch.y.new_zeros(1), batch.progress.step, 17)
            values = projected_intervals(graph, region, self.projections, draws)
            done = relaxed_at(graph, values, slopes_by("same-slope"))
        margins = linear_margins(graph, region, done, batch.y).lower
        return Robust(robust_cross_entropy(margins), done.values)
