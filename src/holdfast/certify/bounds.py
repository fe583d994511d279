"""Certificates from bounds on the margins."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from holdfast.bounds import Bounder, BoundMethod, region_of
from holdfast.bounds.operators import OutsideDomain
from holdfast.bounds.relaxation import SlopeRule
from holdfast.bounds.rounding import Rounding
from holdfast.certify.certificate import Deterministic, Examples, Findings, Tell, by_class
from holdfast.certify.double import in_float64
from holdfast.threat import Threat

CASCADE: tuple[Literal["ibp", "crown-ibp", "crown"], ...] = ("ibp", "crown-ibp", "crown")
"""Cheap first; each on what those before it leave undecided."""


TRACED = 8
"""Inputs on which a trace in float64 is held against the model."""


class BoundCertifier(Deterministic, name="bounds"):
    """Verified where a lower bound of every margin z_y − z_j over the threat set is positive.

    The radius is found by doubling and bisection per example and is itself verified: a lower end, never
    an interpolation. Where that is too expensive, it is eps or 0, and what lies beyond has to be asked (see
    ``radius_search``). Deterministic: a bound counts less what rounding can have added to it.
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
    float64: Literal["undecided", "always", "never"] = "undecided"
    """What is computed in float64: what float32 leaves ``undecided`` within its rounding, everything, or
    nothing."""

    @property
    def title(self) -> str:
        return self.method.upper()

    @property
    def finds_radii(self) -> bool:
        expensive = any(stage.expensive for stage in self._stages())
        return self.radius_search == "always" or (self.radius_search == "cheap" and not expensive)

    def findings(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        seed: int,
        batch_size: int,
        tell: Tell,
        numbers: Tensor,
    ) -> Iterator[tuple[Tensor, Findings]]:
        """In batches no larger than what is bounded together, so that progress is told as it is made."""
        room = Bounder(self.traced(model, x[:1], threat), self._stages()[-1]).room(x)
        return super().findings(model, x, y, threat, seed, min(batch_size, room), tell, numbers)

    def prover(self, model: nn.Module, x: Tensor, threat: Threat) -> Callable[[Examples], Findings]:
        # Of other backends nobody can ask which convolutions they choose; the CPU takes what is theirs.
        whole = self.float64 == "always" or x.device.type not in ("cpu", "cuda")
        double = cache(partial(self._double, model, x, threat))

        def prove(batch: Examples) -> Findings:
            started = time.perf_counter()
            first = double() if whole else self._level(model, batch.x, threat)
            assert first is not None
            last = double if self.float64 == "undecided" and not whole and x.dtype != torch.float64 else None
            bound = _MarginBound(batch.x, batch.y, threat, first, last)
            bound.spend(started, torch.arange(len(batch.x), device=batch.x.device))
            lowest, stage, positive = bound(threat.eps, batch.right)
            holds = batch.right & (lowest > 0) & lowest.isfinite()
            radius, above = self._radius(bound, batch.right, holds, threat)
            methods = [first.bounders[number].method.method for number in stage]
            excluded = by_class(positive, batch.y)
            return Findings(radius, None, ~lowest.isfinite(), above, lowest, excluded, methods, bound.seconds)

        return prove

    def _stages(self) -> list[BoundMethod]:
        common = {"relaxation": self.relaxation, "intersect": self.intersect, "iterations": self.iterations}
        names = CASCADE if self.method == "cascade" else (self.method,)
        return [BoundMethod.model_validate({"method": name, **common}) for name in names]

    def _level(self, model: nn.Module, x: Tensor, threat: Threat) -> _Level:
        """The stages in the precision of x."""
        graph = self.traced(model, x, threat)
        stages = [Bounder(graph, method) for method in self._stages()]
        return _Level(stages, x.new_empty(0), Rounding.of(x.dtype, self.arithmetic))

    def _double(self, model: nn.Module, x: Tensor, threat: Threat) -> _Level | None:
        """The stages in float64, or None where the model cannot be had so."""
        if self.float64 != "always":
            x = x[:TRACED]  # that the trace is the model's was seen in its own precision
        try:
            exact, place = in_float64(model, x)
            return self._level(exact, x.to(place), threat)
        except torch.OutOfMemoryError:  # fewer examples may fit
            raise
        except (ValueError, RuntimeError) as fault:  # whatever a foreign forward makes of float64
            if self.float64 == "always" or x.device.type not in ("cpu", "cuda"):
                raise ValueError(f"the network cannot be bounded in float64: {fault}") from fault
            warnings.warn(f"what float32 leaves undecided stays so, without float64: {fault}", stacklevel=2)
            return None

    def _radius(self, bound: _MarginBound, right: Tensor, holds: Tensor, threat: Threat) -> tuple[Tensor, Tensor]:
        """Per example the largest radius that was verified, and the smallest tried in vain: doubled from eps, then
        bisected by what the bounds are without their slack, and verified in the end. Where that fails, each step is
        verified; in float64 where float32 leaves more open than the search does."""
        cap = threat.covering_eps(bound.x[0].numel())
        unit = min(threat.eps or 1.0, cap)
        none = 0.0 if threat.eps else -1.0
        low = torch.full_like(bound.seconds, threat.eps).masked_fill(~holds, none)  # verified
        high = torch.full_like(low, threat.eps).masked_fill(holds, torch.inf)  # tried in vain, or inf
        if self.finds_radii:
            scale, begin, proven = (cap, unit), high.clone(), low.clone()
            self._search(bound, replace(bound.first, rounding=None), right, low, high, scale)
            missed = (right & (low > proven)).nonzero().squeeze(1)
            for back in (0.0, self.radius_tolerance * unit):  # what its slack takes is seldom more than a step
                trial = torch.maximum(low[missed] - back, proven[missed])
                found = bound.at(bound.first, trial, missed)
                holds = (trial == proven[missed]) | ((found.lowest > 0) & found.lowest.isfinite())
                low[missed[holds]], missed, trial = trial[holds], missed[~holds], trial[~holds]
                high[missed] = torch.minimum(begin[missed], trial)
            low[missed] = proven[missed]
            again = torch.zeros_like(right).index_fill(0, missed, True)
            hopeful = self._search(bound, bound.first, again, low, high, scale)
            hopeful[missed] = torch.maximum(hopeful[missed], high[missed])
            again &= hopeful > low + self.radius_tolerance * unit
            if again.any() and (level := bound.last) is not None:
                high[again] = begin[again]
                self._search(bound, level, again, low, high, scale)
        return torch.where(low >= cap, torch.inf, low), high

    def _search(
        self, bound: _MarginBound, level: _Level, who: Tensor, low: Tensor, high: Tensor, scale: tuple[float, float]
    ) -> Tensor:
        """Narrows what is verified and what was tried in vain, in place; the largest radius of which more precision
        might have shown more, (N,).

        Args:
            scale: the radius that covers the box, and that of which the tolerance is a share.
        """
        (cap, unit), hopeful = scale, torch.zeros_like(low)
        for _ in range(64):
            open_ends = who & (low < cap) & (high - low > self.radius_tolerance * unit)
            rows = open_ends.nonzero().squeeze(1)
            if not len(rows):
                break
            doubled, middle = (2 * low[rows]).clamp(min=unit), (low[rows] + high[rows]) / 2
            trial = torch.where(high[rows].isinf(), doubled, middle).clamp(max=cap)
            found = bound.at(level, trial, rows)
            proven = (found.lowest > 0) & found.lowest.isfinite()
            low[rows] = torch.where(proven, trial, low[rows])
            high[rows] = torch.where(proven, high[rows], trial)
            hopeful[rows] = torch.where(found.near & ~proven, torch.maximum(trial, hopeful[rows]), hopeful[rows])
        return hopeful


@dataclass(frozen=True)
class _Level:
    """The stages in one precision."""

    bounders: list[Bounder]
    place: Tensor
    """Of the type and on the device that the inputs go to."""
    rounding: Rounding | None

    def __call__(self, stage: int, x: Tensor, y: Tensor, threat: Threat, eps: Tensor) -> tuple[Tensor, Tensor]:
        """The margin bounds of each example, (n, K−1) float64, and what more precision could make of the lowest,
        (n,); −inf where the network may not be defined on the whole set."""
        region = region_of(x.to(self.place), threat, eps.to(self.place.device), self.rounding)
        try:
            found = self.bounders[stage].bound(region, y.to(self.place.device))
        except OutsideDomain:
            if len(x) > 1:
                halves = zip(*(t.chunk(2) for t in (x, y, eps)), strict=True)
                parts = [self(stage, each, label, threat, radius) for each, label, radius in halves]
                return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
            graph = self.bounders[stage].graph
            return eps.new_full((1, graph.shape(len(graph.nodes))[0] - 1), -torch.inf), torch.full_like(
                eps, -torch.inf
            )
        return found.lower.to(eps), found.hope.amin(1).to(eps)


class _Lowest(NamedTuple):
    """What is known of n examples at their radii, (n,) each."""

    lowest: Tensor
    """The margin bound, float64."""
    stage: Tensor
    """Of which it comes."""
    near: Tensor
    """Whether more precision could lift it above 0."""
    positive: Tensor
    """Which of the margins are, (n, K−1)."""


class _MarginBound:
    """The lowest margin bound of each example as a function of a radius per example.

    What the first level leaves undecided within its rounding goes to the last one, made when it is first needed.
    """

    def __init__(
        self, x: Tensor, y: Tensor, threat: Threat, first: _Level, last: Callable[[], _Level | None] | None
    ) -> None:
        self.x, self.y, self.threat, self.first, self._last = x, y, threat, first, last
        self.seconds = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        """What each example has cost so far."""

    @property
    def last(self) -> _Level | None:
        return self._last() if self._last else None

    def spend(self, started: float, rows: Tensor) -> None:
        """Share the time since then among these examples."""
        self.seconds[rows] += (time.perf_counter() - started) / max(1, len(rows))

    def __call__(self, eps: float, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The bounds at one radius, (N,) float64, the stage that each comes from, and which of the margins are
        positive, (N, K−1)."""
        radius, everyone = torch.full_like(self.seconds, eps), torch.arange(len(self.x), device=self.x.device)
        found = self.at(self.first, radius, everyone, right)
        lowest, stage, positive = found.lowest, found.stage, found.positive
        rows = (found.near & right & ~(lowest > 0)).nonzero().squeeze(1)
        if len(rows) and (level := self.last) is not None:
            again = self.at(level, radius[rows], rows)
            better = ~(again.lowest <= lowest[rows])  # a NaN replaces what is known, and a number a NaN
            lowest[rows[better]], stage[rows[better]] = again.lowest[better], again.stage[better]
            positive[rows] |= again.positive
        return lowest, stage, positive

    def at(self, level: _Level, eps: Tensor, rows: Tensor, right: Tensor | None = None) -> _Lowest:
        """The bounds of some examples, each at a radius of its own, in one precision; later stages take what is
        right and not yet positive."""
        lowest, number = torch.full_like(eps, -torch.inf), torch.zeros_like(rows)
        near, positive = torch.zeros_like(rows, dtype=torch.bool), rows.new_zeros(len(rows), 0, dtype=torch.bool)
        for stage in range(len(level.bounders)):
            open_ends = ~(lowest > 0) & ~lowest.isnan()
            here = (open_ends & right if stage and right is not None else open_ends).nonzero().squeeze(1)
            if len(here):
                started = time.perf_counter()
                margins, hope = level(stage, self.x[rows[here]], self.y[rows[here]], self.threat, eps[here])
                found = margins.amin(1)
                if not positive.shape[1]:
                    positive = positive.new_zeros(len(rows), margins.shape[1])
                positive[here] |= (margins > 0) & margins.isfinite()
                better = ~(found <= lowest[here])  # a NaN replaces everything, and stays
                lowest[here[better]], number[here[better]] = found[better], stage
                near[here] |= ~(hope <= 0)
                self.spend(started, rows[here])
        return _Lowest(lowest, number, near, positive)
