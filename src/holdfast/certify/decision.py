"""What decides a question about one set: an attack, bounds of the whole set, then bounds of its parts, best first
(Bunel et al., 2020; Wang et al., 2021)."""

from __future__ import annotations

import heapq
import math
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from holdfast.bounds.branching import Branching
from holdfast.bounds.domains import Domains, Packed
from holdfast.bounds.linear import sweep
from holdfast.bounds.operators import Graph
from holdfast.bounds.optimised import optimised
from holdfast.bounds.region import Box, Region
from holdfast.bounds.relaxation import adaptive
from holdfast.certify.clock import Clock
from holdfast.certify.counterexample import Falsifier
from holdfast.certify.input_splits import InputSearch

Verdict = Literal["proved", "refuted", "undecided"]
Method = Literal["attack", "crown", "alpha-crown", "branch-and-bound"]

ROOT_SHARE = 1 / 3
"""Of the time, at most, for the bounds of the whole set."""
ROOT_STEPS, STEPS = 20, 10
"""Gradient steps for the whole set, and for a part of it."""
ROOT_SLOPES = 2**24
"""Optimised for the whole set; of a network with more, those of the last pass."""
STEP_COST = 4
"""Times what CROWN takes, a gradient step of all its slopes; a quarter of the steps shall fit."""
TRIED = 8
"""Of the worst parts so many minimisers are descended from."""
NEARBY = 8, 0.05
"""The steps of it, and the reach of the first."""
FEW = 32
"""Of so many inputs the boxes are split from the start, where the network is more than ReLUs and affine layers."""


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
    """Of these, for bounds of the whole set and what was tried before them."""
    by: Method = "branch-and-bound"
    """What came last."""


Fast = tuple[Graph, Tensor]
"""A network in a precision that is fast, and an empty tensor of it."""


def decided(
    graph: Graph,
    region: Region,
    rows: Tensor,
    offsets: Tensor,
    falsifier: Falsifier,
    clock: Clock,
    fast: Fast | None = None,
) -> Verification:
    """Whether each clause (C, R, K) has a positive row on the region.

    A short attack, CROWN, a longer attack, slopes, and parts: each where those before it do not decide.
    """
    began = time.perf_counter()
    found = _whole(graph, region, rows, offsets, falsifier, clock.part(ROOT_SHARE), fast)
    spent = time.perf_counter() - began
    if isinstance(found, Branching):
        with torch.no_grad():
            found = _in_parts(found, falsifier, clock)
    return replace(found, root_seconds=spent)


def _in_parts(branching: Branching, falsifier: Falsifier, clock: Clock) -> Verification:
    """By parts that ReLUs make, and by boxes of inputs where there is more than ReLUs: from the start where inputs
    are few."""
    region, found = branching.region, None
    few = math.prod(branching.graph.input_shape) <= FEW
    boxes = isinstance(region, Box) and bool(branching.others)
    if not boxes or (branching.rectifiers and not few):
        found = Search(branching, falsifier, clock).run()
        if not boxes or found.verdict != "undecided":
            return found
    assert isinstance(region, Box)
    halved = InputSearch(branching.graph, region, branching.rows, branching.offsets, falsifier, clock).run()
    domains, bound = halved.boxes + (found.domains if found else 0), halved.bound
    if halved.counterexample is not None:
        return Verification("refuted", halved.counterexample, bound, domains, 0.0)
    known = branching.whole().lower.amin().item() if found is None else found.bound
    return Verification("proved" if bound > 0 else "undecided", None, max(bound, known), domains, 0.0)


def _whole(
    graph: Graph,
    region: Region,
    rows: Tensor,
    offsets: Tensor,
    falsifier: Falsifier,
    clock: Clock,
    fast: Fast | None,
) -> Verification | Branching:
    """What is decided without parts, or the bounds to begin with."""
    if (x := falsifier.search(restarts=1, steps=10)) is not None:
        return Verification("refuted", x, -math.inf, 0, 0.0, by="attack")
    functions, before = rows.flatten(0, 1)[None], clock.left
    with torch.no_grad():
        base = sweep(graph, region, lambda _: adaptive, tighten=True, going=clock.going)
    first = optimised(graph, region, functions, 0, enough=lambda _: True, base=base, limit=0)
    assert first is not None  # of one example
    swept = before - clock.left if clock.end < math.inf else 0.0
    branching = Branching(graph, region, rows, offsets, first, fast)
    whole = branching.whole()
    if (bound := whole.lower.amin().item()) > 0:
        return Verification("proved", None, bound, 0, 0.0, by="crown")
    open_ends = whole.take(~(whole.lower > 0))
    # Where a network is flat around the centre, gradients there say little of its far corners.
    if (x := falsifier.from_points(branching.minimisers(open_ends), open_ends.clause)) is None:
        x = falsifier.search()
    if x is not None:
        return Verification("refuted", x, -math.inf, 0, 0.0, by="attack")
    limit = ROOT_SLOPES if STEP_COST * ROOT_STEPS / 4 * swept < clock.left else 0
    pace = _Pace(clock)

    def enough(bounds: Tensor) -> bool:
        return not pace() or bool((bounds.view(rows.shape[:2]) + offsets > 0).any(1).all())

    root = optimised(graph, region, functions, ROOT_STEPS, enough=enough, base=base, limit=limit)
    assert root is not None
    branching = Branching(graph, region, rows, offsets, root, fast)
    if (bound := branching.whole().lower.amin().item()) > 0:
        return Verification("proved", None, bound, 0, 0.0, by="alpha-crown")
    return branching


class _Pace:
    """Whether there is time for one more of some equal steps; asked before each."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.last, self.longest = clock, clock.left, 0.0

    def __call__(self) -> bool:
        left = self.clock.left
        if left < math.inf:
            self.longest, self.last = max(self.longest, self.last - left), left
        return left > self.longest


class Search:
    """Best first through the parts of a region: those with the lowest bounds are split, a batch at a time."""

    def __init__(self, branching: Branching, falsifier: Falsifier, clock: Clock) -> None:
        self.branching, self.falsifier, self.clock = branching, falsifier, clock
        self.queue: list[tuple[float, int, Packed]] = []
        """A heap by the bound, and by age where bounds are equal."""
        self.proved, self.stuck, self.domains, self._age = math.inf, math.inf, 0, 0
        """The lowest bounds of the parts that are done, and of those that nothing decides."""
        self._size, self._each = 8, 0.0
        """Parts of the next batch, and the seconds that one took in the last."""

    def run(self) -> Verification:
        self._push(self.branching.whole())
        while self.queue:
            if not self.clock.going():
                return self._answer("undecided")
            began = time.perf_counter()
            count = min(self._batch, len(self.queue))
            now = self.branching.waiting.unpacked([heapq.heappop(self.queue)[2] for _ in range(count)])
            if (x := self._step(now)) is not None:
                return self._answer("refuted", x)
            self._each = (time.perf_counter() - began) / count
            self._size *= 2
        return self._answer("proved" if self.stuck == math.inf else "undecided")

    @property
    def _batch(self) -> int:
        """As many parts as memory and time allow; the first batches tell how long one takes."""
        soon = self._size if not self._each else int(min(self.clock.left / self._each, 2**20))
        return max(1, min(self._size, self.branching.batch, soon))

    def _step(self, now: Domains) -> Tensor | None:
        """Split some parts and bound their halves; a counterexample, if one turns up."""
        branching = self.branching
        if (x := self._attacked(now.take(slice(TRIED)))) is not None:
            return x
        pick = branching.choice(now)
        inner, leaves = (pick >= 0).nonzero().squeeze(1), (pick < 0).nonzero().squeeze(1)
        for leaf in now.take(leaves).one_by_one():
            if (x := self._leaf(leaf)) is not None:
                return x
        if len(inner):
            halves = branching.split(now.take(inner), pick[inner])
            self._push(branching.bounded(halves, STEPS, self.clock.going))
            self.domains += len(halves)
        return None

    def _push(self, domains: Domains) -> None:
        lower = domains.lower.tolist()
        self.proved = min([self.proved, *(bound for bound in lower if bound > 0)])
        left = [row for row, bound in enumerate(lower) if not bound > 0]
        parts = self.branching.waiting.packed(
            domains.take(torch.tensor(left, device=domains.lower.device, dtype=torch.int64))
        )
        for row, part in zip(left, parts, strict=True):
            self._age += 1
            heapq.heappush(self.queue, (lower[row], self._age, part))

    def _attacked(self, domains: Domains) -> Tensor | None:
        x = self.branching.minimisers(domains)
        return self.falsifier.from_points(x, domains.clause, *NEARBY)

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
