"""Certificates from bounds on the margins."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from holdfast.bounds import Bounder, BoundMethod, region_of, trace
from holdfast.bounds.relaxation import SlopeRule
from holdfast.certify.certificate import Certifier, Examples, Findings
from holdfast.threat import Threat

CASCADE: tuple[Literal["ibp", "crown-ibp", "crown"], ...] = ("ibp", "crown-ibp", "crown")
"""Cheap first; each on what those before it leave undecided."""


class BoundCertifier(Certifier, name="bounds"):
    """Verified where a lower bound of every margin z_y − z_j over the threat set is positive.

    The radius is found by doubling and bisection per example and is itself verified: a lower end, never
    an interpolation. Where that is too expensive, it is eps or 0, and what lies beyond has to be asked (see
    ``radius_search``). Deterministic, up to the rounding of the bound's own floating-point arithmetic.
    """

    method: Literal["ibp", "crown-ibp", "crown", "cap", "one-step", "alpha-crown", "bcp", "lmt", "cascade"] = "ibp"
    """How the margins are bounded (see ``holdfast.bounds.BoundMethod``); ``cascade`` asks ibp, then crown-ibp, then
    crown, each about the examples that are not decided yet."""
    relaxation: SlopeRule = "adaptive"
    """Slope of the line below an unstable ReLU."""
    intersect: bool = True
    """Cut what linear passes find with the intervals."""
    iterations: PositiveInt = 20
    """Gradient steps of alpha-crown."""
    radius_tolerance: float = Field(default=0.01, gt=0)
    """The bisection stops at this share of eps."""
    radius_search: Literal["cheap", "always", "never"] = "cheap"
    """Whether each example's radius is searched by the method itself, which takes it some ten times: ``cheap``,
    unless it bounds every neuron (crown, cap, alpha-crown, cascade)."""

    @property
    def title(self) -> str:
        return self.method.upper()

    @property
    def finds_radii(self) -> bool:
        expensive = any(stage.expensive for stage in self._stages())
        return self.radius_search == "always" or (self.radius_search == "cheap" and not expensive)

    def prover(self, model: nn.Module, x: Tensor, threat: Threat) -> Callable[[Examples], Findings]:
        stages = self._stages()

        def prove(batch: Examples) -> Findings:
            started = time.perf_counter()
            bound = _MarginBound(model, batch.x, batch.y, threat, stages)
            bound.spend(started, torch.arange(len(batch.x), device=batch.x.device))
            lowest, stage = bound(torch.full_like(batch.x.flatten(1)[:, 0], threat.eps), right=batch.right)
            # At eps = 0 there is but the image itself, and no bound to make of it.
            holds = batch.right & ((lowest > 0) | (threat.eps == 0)) & lowest.isfinite()
            radius, above = self._radius(bound, batch.right, holds, threat)
            methods = [stages[number].method for number in stage]
            return Findings(radius, None, ~lowest.isfinite(), above, lowest, methods, bound.seconds)

        return prove

    def _stages(self) -> list[BoundMethod]:
        common = {"relaxation": self.relaxation, "intersect": self.intersect, "iterations": self.iterations}
        names = CASCADE if self.method == "cascade" else (self.method,)
        return [BoundMethod.model_validate({"method": name, **common}) for name in names]

    def _radius(self, bound: _MarginBound, right: Tensor, holds: Tensor, threat: Threat) -> tuple[Tensor, Tensor]:
        """Per example the largest radius that was verified, and the smallest tried in vain: doubled from eps, then
        bisected."""
        cap = threat.covering_eps(bound.x[0].numel())
        unit = min(threat.eps or 1.0, cap)
        low = holds.double() * threat.eps  # verified
        high = torch.full_like(low, threat.eps).masked_fill(holds, torch.inf)  # tried in vain, or inf
        for _ in range(64) if self.finds_radii else ():
            open_ends = right & (low < cap) & (high - low > self.radius_tolerance * unit)
            rows = open_ends.nonzero().squeeze(1)
            if not len(rows):
                break
            doubled, middle = (2 * low[rows]).clamp(min=unit), (low[rows] + high[rows]) / 2
            trial = torch.where(high[rows].isinf(), doubled, middle).clamp(max=cap)
            lowest, _ = bound(trial.to(bound.x.dtype), rows)
            proven = (lowest > 0) & lowest.isfinite()
            low[rows] = torch.where(proven, trial, low[rows])
            high[rows] = torch.where(proven, high[rows], trial)
        return torch.where(low >= cap, torch.inf, low), high


class _MarginBound:
    """The lowest margin bound of each example as a function of a radius per example."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, stages: list[BoundMethod]) -> None:
        self.x, self.y, self.threat = x, y, threat
        self.graph = trace(model, x, box=threat.interval(x))
        self.stages = [Bounder(self.graph, method) for method in stages]
        self.seconds = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        """What each example has cost so far."""

    def spend(self, started: float, rows: Tensor) -> None:
        """Share the time since then among these examples."""
        self.seconds[rows] += (time.perf_counter() - started) / max(1, len(rows))

    def __call__(
        self, eps: Tensor, rows: Tensor | None = None, right: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The bounds, and the stage that each comes from; later stages take what is right and not yet positive."""
        rows = torch.arange(len(self.x), device=self.x.device) if rows is None else rows
        lowest, number = torch.full_like(eps, -torch.inf), torch.zeros_like(rows)
        for stage, bounder in enumerate(self.stages):
            open_ends = ~(lowest > 0) & ~lowest.isnan()
            here = (open_ends & right if stage and right is not None else open_ends).nonzero().squeeze(1)
            if len(here):
                started = time.perf_counter()
                region = region_of(self.x[rows[here]], self.threat, eps[here])
                found = bounder.margins(region, self.y[rows[here]]).amin(1)
                better = ~(found <= lowest[here])  # a NaN replaces everything, and stays
                lowest[here[better]], number[here[better]] = found[better], stage
                self.spend(started, rows[here])
        return lowest, number
