"""Complete verification: what bounds and attacks leave open is split, and each part bounded, until all is decided
or the time is up (Bunel et al., 2020; Wang et al., 2021)."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from holdfast.bounds.branching import Branching, Domains
from holdfast.bounds.graph import trace
from holdfast.bounds.heads import margins_after
from holdfast.bounds.interval import Interval
from holdfast.bounds.operators import Graph
from holdfast.bounds.optimised import optimised
from holdfast.bounds.region import Box, Region, region_of, rounded
from holdfast.bounds.rounding import Rounding
from holdfast.bounds.specification import margin_rows
from holdfast.certify.bounds import BoundCertifier
from holdfast.certify.certificate import Deterministic, Findings, Tell
from holdfast.certify.counterexample import Falsifier
from holdfast.certify.double import in_float64
from holdfast.inference import door, frozen_eval, plain_arithmetic
from holdfast.threat import Threat

Verdict = Literal["proved", "refuted", "undecided"]

ROOT_SHARE = 1 / 3
"""Of the time, at most, for the slopes of the first bounds."""
ROOT_STEPS, STEPS = 20, 10
"""Gradient steps for the whole set, and for a part of it."""
TRIED = 8
"""Of the worst parts so many minimisers are descended from."""


@dataclass(frozen=True)
class Verification:
    """What became of a question about all inputs of a set."""

    verdict: Verdict
    """"proved": it holds on all of the set, of real numbers; "refuted": it does not, see the counterexample;
    "undecided": the time was up, or nothing was left to split."""
    counterexample: Tensor | None
    """(1, ...), where refuted: in the set, wrong in the model's own computation and for real numbers."""
    bound: float
    """Every clause has a row that is at least this on all of the set; more than 0 where and only where proved."""
    domains: int
    """Parts that were bounded; 0 where the set was not split."""
    seconds: float
    root_seconds: float = 0.0
    """Of these, until the bounds of the whole set were there."""


Clock = Callable[[], float]
"""The seconds that are left."""


def _clock(seconds: float | None) -> Clock:
    end = math.inf if seconds is None else time.perf_counter() + seconds
    return lambda: end - time.perf_counter()


@door
def verify(
    model: nn.Module,
    lower: Tensor,
    upper: Tensor,
    rows: Tensor | Sequence[Tensor],
    offsets: Tensor | Sequence[Tensor],
    *,
    seconds: float | None = None,
) -> Verification:
    """Whether a property of the logits holds on a whole box: a conjunction of clauses, each a disjunction of rows.

    A clause of rows (R, K) and offsets (R,) holds at an input where SOME entry of rows @ logits + offsets is
    positive; the property where EVERY clause does. So ``rows=[(A, b), ...]`` asks ∧_c ∨_r (A_c z + b_c)_r > 0. In
    place of a list one tensor (C, K), offsets (C,), gives clauses of one row each: all entries must be positive.

    Args:
        model: any module from (N, ...) inputs to (N, K) logits; asked in eval mode and left as it was.
        lower: of the box, (1, ...) as a batch of one input, floating; exact as given, in float64 where it is.
        upper: as ``lower``.
        rows: (C, K), or a list of C tensors (R_c, K).
        offsets: (C,), or a list of C tensors (R_c,).
        seconds: after about so many the answer is "undecided"; None for no limit.

    Raises:
        ValueError: shapes that do not fit, an empty or infinite box, or a network that ends in a softmax.
        UnsupportedOperator: the model holds an operator without a bound rule.
    """
    clock, started = _clock(seconds), time.perf_counter()
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0)).detach().new_empty(0)
    ends = _ends(lower, upper)
    clauses, constants = _clauses(rows, offsets)
    with frozen_eval(model), plain_arithmetic(like.device):
        x = ((ends[0] + ends[1]) / 2).to(like)
        network = _Network.of(model, x, ends)
        if network.graph.heads:
            raise ValueError("the network ends in a softmax; ask about the logits before it")
        if network.graph.shape(len(network.graph.nodes)) != clauses.shape[2:]:
            raise ValueError(
                f"rows of {clauses.shape[2]} entries do not fit logits of shape "
                f"{network.graph.shape(len(network.graph.nodes))}"
            )
        place, rounding = network.place, Rounding.of(network.place.dtype)
        low, high = (rounded(end, place.dtype, way) for end, way in zip(ends, (-math.inf, math.inf), strict=True))
        region = Box(Interval.between(low.to(place), high.to(place), rounding))
        clauses, constants = clauses.to(place), constants.to(place)
        box = ends[0].to(place.device), ends[1].to(place.device)
        falsifier = Falsifier(model, network.graph, like, box, clauses, constants)
        found = _decided(network.graph, region, clauses, constants, falsifier, clock)
    return replace(found, seconds=time.perf_counter() - started)


def _ends(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    lower, upper = (torch.as_tensor(end).detach().double() for end in (lower, upper))
    if lower.shape != upper.shape or lower.shape[:1] != (1,):
        shapes = f"{tuple(lower.shape)} and {tuple(upper.shape)}"
        raise ValueError(f"a box needs two ends of one shape (1, ...), given {shapes}")
    if not ((lower <= upper).all() and lower.isfinite().all() and upper.isfinite().all()):
        raise ValueError("a box needs finite ends with lower ≤ upper")
    return lower, upper


def _clauses(rows: Tensor | Sequence[Tensor], offsets: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """All clauses with as many rows as the longest, (C, R, K) and (C, R); a row twice says nothing new."""
    if isinstance(rows, Tensor) and isinstance(offsets, Tensor):
        rows, offsets = rows[:, None].unbind(0), offsets[:, None].unbind(0)
    fit = (
        len(rows) == len(offsets)
        and len(rows)
        and all(
            row.dim() == 2 and len(row) and row.shape == (*offset.shape, rows[0].shape[1])
            for row, offset in zip(rows, offsets, strict=True)
        )
    )
    if not fit:
        raise ValueError("clauses are rows (R, K) with offsets (R,) each, all of one K, and at least one")
    longest = max(len(row) for row in rows)
    index = [[*range(len(row)), *[0] * (longest - len(row))] for row in rows]
    return (
        torch.stack([row.detach().double()[place] for row, place in zip(rows, index, strict=True)]),
        torch.stack([offset.detach().double()[place] for offset, place in zip(offsets, index, strict=True)]),
    )


class _Network(NamedTuple):
    """The network as it is bounded: in float64 where it can be had so."""

    graph: Graph
    place: Tensor
    """Of the type and on the device that the inputs go to."""

    @classmethod
    def of(cls, model: nn.Module, x: Tensor, ends: tuple[Tensor, Tensor]) -> _Network:
        try:
            exact, place = in_float64(model, x)
        except ValueError:  # it cannot be copied
            exact, place = model, x.new_empty(0)
        return cls(trace(exact, x.to(place), box=(ends[0].to(place), ends[1].to(place))), place)


def _decided(
    graph: Graph, region: Region, rows: Tensor, offsets: Tensor, falsifier: Falsifier, clock: Clock
) -> Verification:
    """Whether each clause (C, R, K) has a positive row on the region: an attack first, then bounds, then parts."""
    if (x := falsifier.search()) is not None:
        return Verification("refuted", x, -math.inf, 0, 0.0)
    limit, began = ROOT_SHARE * clock(), time.perf_counter()

    def enough(bounds: Tensor) -> bool:
        proved = (bounds.view(rows.shape[:2]) + offsets > 0).any(1).all()
        return bool(proved) or clock() < 2 * limit

    root = optimised(graph, region, rows.flatten(0, 1)[None], ROOT_STEPS, enough=enough)
    assert root is not None  # of one example
    spent = time.perf_counter() - began
    with torch.no_grad():
        found = _Search(Branching(graph, region, rows, offsets, root), falsifier, clock).run()
    return replace(found, root_seconds=spent)


class _Search:
    """Best first through the parts of a region: those with the lowest bounds are split, a batch at a time."""

    def __init__(self, branching: Branching, falsifier: Falsifier, clock: Clock) -> None:
        self.branching, self.falsifier, self.clock = branching, falsifier, clock
        self.queue: list[tuple[float, int, Domains]] = []
        """A heap by the bound, and by age where bounds are equal."""
        self.proved, self.stuck, self.domains, self._age = math.inf, math.inf, 0, 0
        """The lowest bounds of the parts that are done, and of those that nothing decides."""

    def run(self) -> Verification:
        branching = self.branching
        self._push(branching.whole())
        while self.queue:
            if self.clock() <= 0:
                return self._answer("undecided")
            count = min(branching.batch, len(self.queue))
            now = Domains.joined([heapq.heappop(self.queue)[2] for _ in range(count)])
            if (x := self._attacked(now.take(slice(TRIED)))) is not None:
                return self._answer("refuted", x)
            pick = branching.choice(now)
            inner, leaves = (pick >= 0).nonzero().squeeze(1), (pick < 0).nonzero().squeeze(1)
            for leaf in now.take(leaves).one_by_one():
                if (x := self._leaf(leaf)) is not None:
                    return self._answer("refuted", x)
            if len(inner):
                self._push(branching.bounded(branching.split(now.take(inner), pick[inner]), STEPS), split=True)
        return self._answer("proved" if self.stuck == math.inf else "undecided")

    def _push(self, domains: Domains, *, split: bool = False) -> None:
        self.domains += split * len(domains)
        for lower, domain in zip(domains.lower.tolist(), domains.one_by_one(), strict=True):
            if lower > 0:
                self.proved = min(self.proved, lower)
            else:
                self._age += 1
                heapq.heappush(self.queue, (lower, self._age, domain))

    def _attacked(self, domains: Domains) -> Tensor | None:
        x = self.branching.minimisers(domains)
        return self.falsifier.confirmed(self.falsifier.descended(x.double(), domains.clause, 5, 0.02))

    def _leaf(self, domain: Domains) -> Tensor | None:
        """What the linear program of a part says: a counterexample, or that the part is done or stuck."""
        found = self.branching.leaf(domain)
        lower = domain.lower.item()
        if found is not None:
            if (x := self.falsifier.confirmed(found[1].double())) is not None:
                return x
            lower = found[0].lower.item()
        if lower > 0:
            self.proved = min(self.proved, lower)
        else:
            self.stuck = min(self.stuck, lower)
        return None

    def _answer(self, verdict: Verdict, x: Tensor | None = None) -> Verification:
        bound = -math.inf if x is not None else min(self.proved, self.stuck, *(e[0] for e in self.queue[:1]))
        return Verification(verdict, x, bound, self.domains, 0.0)


class BranchAndBoundCertifier(Deterministic, name="branch-and-bound"):
    """Verified or refuted, image by image, up to a time limit: what ibp, crown-ibp and crown leave open is attacked
    and then split.

    Complete for networks of ReLUs and affine layers in l_inf, given the time and but for margins as small as
    rounding. Where the answer is no, the certificate holds the counterexample. Deterministic, apart from where the
    clock ends it.
    """

    seconds: PositiveFloat = 10.0
    """For each image that the cheap bounds leave open."""

    @property
    def finds_radii(self) -> bool:
        return False

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
    ) -> Findings:
        if self.arithmetic != "real":
            raise ValueError("branch-and-bound states arithmetic real alone; crown states float32")
        cheap = BoundCertifier(method="cascade", radius_search="never")
        found = cheap.findings(model, x, y, threat, seed, batch_size, lambda left, samples: None, numbers)
        margin, excluded, method, spent = found.margin, found.excluded, found.method, found.seconds
        assert margin is not None
        assert excluded is not None
        assert method is not None
        assert spent is not None
        assert found.error is not None
        open_ends = (found.prediction == y) & (found.radius < threat.eps) & ~found.error
        rows, counterexample = open_ends.nonzero().squeeze(1).tolist(), torch.full_like(x, torch.nan)
        tell(len(rows), 0)
        network = _Network.of(model, x[:1], threat.interval(x[:1].double())) if rows else None
        for left, row in zip(range(len(rows) - 1, -1, -1), rows, strict=True):
            assert network is not None
            one = slice(row, row + 1)
            started = time.perf_counter()
            answer = self._decided(network, model, x[one], y[one], threat)
            method[row] = self.name
            spent[row] += time.perf_counter() - started
            if answer.verdict == "proved":
                found.radius[row], excluded[row] = threat.eps, True
            elif answer.counterexample is not None:
                counterexample[one] = answer.counterexample.to(x)
            margin[row] = max(margin[row].item(), answer.bound)
            tell(left, 0)
        return replace(found, counterexample=counterexample)

    def _decided(self, network: _Network, model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Verification:
        """Of one image."""
        clock, (graph, place) = _clock(self.seconds), network
        region = region_of(x.to(place), threat, rounding=Rounding.of(place.dtype))
        classes = graph.shape(len(graph.nodes))[0]
        rows = margin_rows(y.to(place.device), classes, place.dtype)[0][:, None]
        centre = x.to(place.device).double()
        low, high = (  # rounding has moved these ends by half a step
            torch.where((end > threat.low) & (end < threat.high), torch.nextafter(end, centre), end)
            for end in threat.interval(centre)
        )
        ball = None if threat.is_box else (centre, threat)
        offsets = rows.new_zeros(rows.shape[:2])
        falsifier = Falsifier(model, graph, x[:0], (low, high), rows, offsets, ball=ball, strictly=True)
        found = _decided(graph, region, rows, offsets, falsifier, clock)
        if not graph.heads or not math.isfinite(found.bound):
            return found
        margins = rows.new_full((1, len(rows)), found.bound)
        return replace(found, bound=margins_after(graph.heads, margins).amin().item())
