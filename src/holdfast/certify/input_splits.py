"""Branch and bound over boxes of inputs: for networks with nodes that no split of ReLUs makes exact."""

from __future__ import annotations

import heapq
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.bounds.interval import Interval
from holdfast.bounds.linear import backward, sweep
from holdfast.bounds.operators import Graph
from holdfast.bounds.region import Box
from holdfast.bounds.relaxation import adaptive
from holdfast.bounds.rounding import STEPS
from holdfast.certify.clock import Clock
from holdfast.certify.counterexample import Falsifier

MOST = 64
"""Boxes bounded at a time."""
NARROW = 2.0**-24
"""Of the first box's widest side, so wide a box is not split any more."""
NEARBY = 8, 0.05
"""Steps of descent from the minimisers of bounds, and the reach of the first."""


@dataclass(frozen=True)
class Halved:
    """What splitting a box came to."""

    counterexample: Tensor | None
    bound: float
    """At least this everywhere; −inf where there is a counterexample."""
    boxes: int
    """That were bounded."""


class InputSearch:
    """Best first through the parts of a box, each halved along the input that its bound hangs on most.

    Args:
        box: of one example, with its rounding.
        rows, offsets: the clauses, (C, R, K) and (C, R).
    """

    def __init__(
        self, graph: Graph, box: Box, rows: Tensor, offsets: Tensor, falsifier: Falsifier, clock: Clock
    ) -> None:
        self.graph, self.box, self.rows, self.offsets = graph, box.box, rows, offsets
        self.falsifier, self.clock = falsifier, clock
        self.narrow = NARROW * box.box.radius.amax().item()
        self.queue: list[tuple[float, int, Tensor, Tensor]] = [(-math.inf, 0, self.box.lower, self.box.upper)]
        self.settled, self.boxes, self._age = math.inf, 0, 0
        """The lowest bound of the boxes that are done, or too narrow."""

    def run(self) -> Halved:
        size, each = 1, 0.0
        while self.queue and self.clock.going():
            began = time.perf_counter()
            soon = int(min(self.clock.left / each, MOST)) if each else MOST
            count = max(1, min(size, soon, MOST, len(self.queue)))
            now = [heapq.heappop(self.queue) for _ in range(count)]
            if (
                x := self._step(*(torch.cat(ends) for ends in zip(*(one[2:] for one in now), strict=True)))
            ) is not None:
                return Halved(x, -math.inf, self.boxes)
            each, size = (time.perf_counter() - began) / count, 2 * size
        return Halved(None, min([self.settled, *(one[0] for one in self.queue[:1])]), self.boxes)

    def _step(self, lower: Tensor, upper: Tensor) -> Tensor | None:
        """Halve boxes (M, ...) and bound the halves; a counterexample, if one turns up."""
        box = Box(Interval.between(lower, upper, self.box.rounding))
        bounds, worst, coefficients = self._bounds(box)
        self.boxes += len(bounds)
        open_ends = (~(bounds > 0)).nonzero().squeeze(1)
        self.settled = min([self.settled, *bounds[bounds > 0].tolist()])
        if not len(open_ends):
            return None
        lower, upper, coefficients = lower[open_ends], upper[open_ends], coefficients[open_ends]
        centre, radius = (lower + upper) / 2, (upper - lower) / 2
        x = self.falsifier.from_points(centre - radius * coefficients.sign(), worst[open_ends], *NEARBY)
        if x is not None:
            return x
        gain = (radius * (coefficients.abs() + 1e-6 * coefficients.abs().amax() + 1e-30)).flatten(1)
        axis = gain.argmax(1, keepdim=True)
        at = [
            end.flatten(1).scatter(1, axis, centre.flatten(1).gather(1, axis)).view_as(end)
            for end in (upper, lower)
        ]
        for row, bound in enumerate(bounds[open_ends].tolist()):
            if radius[row].amax().item() <= self.narrow:
                self.settled = min(self.settled, bound)
                continue
            here = slice(row, row + 1)
            for ends in ((lower[here], at[0][here]), (at[1][here], upper[here])):
                self._age += 1
                heapq.heappush(self.queue, (bound, self._age, *ends))
        return None

    def _bounds(self, box: Box) -> tuple[Tensor, Tensor, Tensor]:
        """Of each of M boxes the bound, (M,), its worst clause, (M,), and the linear function that bounds it there,
        (M, ...)."""
        graph, last, (clauses, each, _) = self.graph, len(self.graph.nodes), self.rows.shape
        count = len(box.box.centre)
        done = sweep(graph, box, lambda _: adaptive, tighten=True)
        rows = self.rows.flatten(0, 1)[None].expand(count, -1, -1)
        found = done.bound(graph, box, last, rows).lower.view(count, clauses, each) + self.offsets
        rounding = box.rounding
        unit = 0.0 if rounding is None else 1.001 * rounding.gamma(1)
        found = found - STEPS * unit * (found.abs() + 2 * self.offsets.abs())
        found = torch.where(found.isfinite(), found, -torch.inf)  # what overflows is no bound
        largest, row = found.max(2)
        bounds, worst = largest.min(1)
        a = self.rows[worst, row.gather(1, worst[:, None])[:, 0]][:, None]
        return bounds, worst, backward(graph, done.relaxations, last, a).coefficients[:, 0]
