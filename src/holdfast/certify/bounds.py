"""Certificates from bounds on the margins."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from holdfast.bounds import Interval, interval_margins, trace
from holdfast.certify.certificate import Certificate, Certifier
from holdfast.inference import check_inputs, check_logits, frozen_eval, predict
from holdfast.threat import Threat


class BoundCertifier(Certifier, name="bounds"):
    """Verified where a lower bound of every margin z_y − z_j over the threat set is positive.

    The radius is found by doubling and bisection per example and is itself verified: a lower end, never
    an interpolation. Deterministic, up to the rounding of the bound's own floating-point arithmetic.
    """

    method: Literal["ibp"] = "ibp"
    """How the margins are bounded: ``ibp`` propagates intervals."""
    radius_tolerance: float = Field(default=0.01, gt=0)
    """The bisection stops at this share of eps."""

    @property
    def title(self) -> str:
        return self.method.upper()

    @torch.no_grad()
    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, seed: int = 0, batch_size: int = 256
    ) -> Certificate:
        y = check_inputs(x, y, threat)
        parts = [(torch.zeros_like(y[:0]), torch.zeros_like(y[:0]).bool(), torch.zeros_like(y[:0]).double())]
        status: list[str] = []
        with frozen_eval(model):
            for batch, labels in zip(x.split(batch_size), y.split(batch_size), strict=True) if len(x) else ():
                logits = predict(model, batch, batch_size)
                check_logits(logits, labels)
                prediction = logits.argmax(1)
                bound = _MarginBound(model, batch, labels, threat)
                lowest = bound(torch.full_like(batch.flatten(1)[:, 0], threat.eps))
                right = prediction == labels
                holds = right & (lowest > 0) & lowest.isfinite()
                parts.append((prediction, holds, self._radius(bound, right, holds, threat)))
                status += [
                    "error" if not math.isfinite(low) else "verified" if ok else "undecided" if hit else "wrong"
                    for low, ok, hit in zip(lowest.tolist(), holds.tolist(), right.tolist(), strict=True)
                ]
        prediction, verified, radius = (torch.cat(column) for column in zip(*parts, strict=True))
        return Certificate(prediction, verified, radius, status, "deterministic")

    def _radius(self, bound: _MarginBound, right: Tensor, holds: Tensor, threat: Threat) -> Tensor:
        """The largest radius per example that was verified: doubled from eps, then bisected."""
        cap = threat.covering_eps(bound.x[0].numel())
        unit = min(threat.eps or 1.0, cap)
        low = torch.where(holds, threat.eps, 0.0).double()  # verified
        high = torch.where(holds, torch.inf, threat.eps).to(low)  # tried in vain, or inf
        for _ in range(64):
            open_ends = right & (low < cap) & (high - low > self.radius_tolerance * unit)
            rows = open_ends.nonzero().squeeze(1)
            if not len(rows):
                break
            doubled, middle = (2 * low[rows]).clamp(min=unit), (low[rows] + high[rows]) / 2
            trial = torch.where(high[rows].isinf(), doubled, middle).clamp(max=cap)
            lowest = bound(trial.to(bound.x.dtype), rows)
            proven = (lowest > 0) & lowest.isfinite()
            low[rows] = torch.where(proven, trial, low[rows])
            high[rows] = torch.where(proven, high[rows], trial)
        return torch.where(low >= cap, torch.inf, low)


class _MarginBound:
    """The lowest margin bound of each example as a function of a radius per example."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> None:
        self.x, self.y, self.threat = x, y, threat
        self.graph = trace(model, x, box=threat.interval(x))

    def __call__(self, eps: Tensor, rows: Tensor | None = None) -> Tensor:
        x, y = (self.x, self.y) if rows is None else (self.x[rows], self.y[rows])
        box = Interval.between(*self.threat.interval(x, eps))
        return interval_margins(self.graph, box, y).amin(1)
