"""The attack of Carlini and Wagner in l_2."""

from __future__ import annotations

import math

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import nn

from holdfast.attacks.attack import GradientAttack, MinimumNormAttack, Nearest, Targets
from holdfast.attacks.losses import asked, gap
from holdfast.search import slopes_of
from holdfast.threat import Threat

SPREAD = 1e-3
"""The least difference between the two largest logits that they are stretched to."""


class CarliniWagner(MinimumNormAttack, GradientAttack, name="carlini-wagner"):
    """min ‖δ‖² + c · max(z_y − max_{j≠y} z_j + κ, 0) by Adam, c by bisection (Carlini & Wagner, 2017).

    x + δ = (low + high)/2 + (high − low)/2 · tanh(w) keeps to the box. Made for l_2; distances are in the
    threat's norm.
    """

    steps: PositiveInt = 200
    """Adam steps for each c."""
    searches: PositiveInt = 9
    """Values of c."""
    lr: PositiveFloat = 0.01
    """Of Adam, in units of w."""
    first: PositiveFloat = 0.01
    """The first c; it grows tenfold until it succeeds."""
    confidence: NonNegativeFloat = 0.0
    """κ, by how much another class shall lead."""

    @property
    def title(self) -> str:
        return f"CW-{self.searches} × {self.steps}"

    def minimise(self, model: nn.Module, targets: Targets, threat: Threat, nearest: Nearest) -> None:
        if not (math.isfinite(threat.low) and math.isfinite(threat.high)):
            raise ValueError("carlini-wagner needs a finite box; fmn and ddn do without one")
        x, y = targets.x, targets.y
        # Logits that are all but equal would need a c beyond those that are tried: they are told apart first.
        spread = gap(targets.logits, y).abs()
        unit = torch.where(spread > 0, SPREAD / spread, 1).clamp(min=1)
        middle, half = (threat.high + threat.low) / 2, (threat.high - threat.low) / 2
        origin = torch.atanh(((x - middle) / half).clamp(-1 + 1e-6, 1 - 1e-6))
        c = torch.full_like(nearest.distance, self.first)
        low, high = torch.zeros_like(c), torch.full_like(c, torch.inf)
        for search in range(self.searches):
            w = origin.clone().requires_grad_(True)
            adam = torch.optim.Adam([w], lr=self.lr)
            reached = torch.zeros_like(targets.y, dtype=torch.bool)
            for step in range(self.steps + 1):
                with torch.enable_grad():
                    points = middle + half * torch.tanh(w)
                    gain, wrong = asked(model, points, y, lambda logits: unit * gap(logits, y), self.samples)
                    cost = (points - x).flatten(1).square().sum(1) + c * (self.confidence - gain).clamp(min=0)
                reached |= gain.detach() >= self.confidence
                nearest.offer(points, wrong, step, search)
                nearest.count(1, int(step < self.steps))
                if step == self.steps:
                    break
                w.grad, odd = slopes_of(cost, w)
                nearest.best.odd.logical_or_(odd)
                adam.step()
            high = torch.where(reached, torch.minimum(high, c), high)
            low = torch.where(reached, low, torch.maximum(low, c))
            c = torch.where(torch.isfinite(high), (low + high) / 2, 10 * low)
