"""Counterexamples to a specification: looked for by descent, believed only when two computations confirm them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from holdfast.bounds.interval import Interval
from holdfast.bounds.operators import Graph
from holdfast.bounds.region import Box, rounded
from holdfast.bounds.rounding import Rounding
from holdfast.bounds.specification import interval_of_rows, interval_values
from holdfast.threat import Threat

WORST = 10
"""So many clauses are descended, those that are lowest where the descent begins."""


class Falsifier:
    """Looks for points of a set where some clause of a specification has no positive row.

    Points are float64; where the set has numbers of the model's own type, they are such.

    Args:
        graph: of the network in some precision, in which a finding is confirmed.
        like: of the type and on the device that the model takes.
        box: lower and upper end of the set, (1, ...) float64 each, as is what follows.
        rows: (C, R, K), as ``holdfast.bounds.branching.Branching`` takes them.
        offsets: (C, R).
        ball: the centre (1, ...) and threat of a set that is less than the box.
        strictly: whether ties are no violations, so that all rows have to be negative.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        like: Tensor,
        box: tuple[Tensor, Tensor],
        rows: Tensor,
        offsets: Tensor,
        *,
        ball: tuple[Tensor, Threat] | None = None,
        strictly: bool = False,
    ) -> None:
        self.model, self.graph, self.like, self.box = model, graph, like, box
        self.rows, self.offsets, self.ball, self.strictly = rows, offsets, ball, strictly
        ways = (torch.inf, -torch.inf)
        inner = [rounded(end, like.dtype, way).double() for end, way in zip(box, ways, strict=True)]
        none = inner[0] > inner[1]  # no such number between the ends
        self.low, self.high = (torch.where(none, end, near) for end, near in zip(box, inner, strict=True))

    def search(self, restarts: int = 5, steps: int = 40, seed: int = 0) -> Tensor | None:
        """A counterexample (1, ...), from the centre and from random points towards each of the worst clauses."""
        generator = torch.Generator().manual_seed(seed)
        shape = (restarts, *self.low.shape[1:])
        share = torch.rand(shape, generator=generator, dtype=torch.float64).to(self.low.device)
        share[0] = 0.5
        x = self.feasible(self.low + share * (self.high - self.low))
        with torch.no_grad():
            worst = self.largest(x[:1])[0].topk(min(WORST, len(self.rows)), largest=False).indices
        clause = worst.repeat_interleave(restarts)
        return self.confirmed(self.descended(x.repeat(len(worst), *[1] * (x.dim() - 1)), clause, steps, 0.25))

    def from_points(self, x: Tensor, clause: Tensor, steps: int = 40, reach: float = 0.1) -> Tensor | None:
        """A counterexample (1, ...) on the way down from each of some points (n, ...), to the clause of each."""
        return self.confirmed(self.descended(self.feasible(x.double()), clause, steps, reach))

    def descended(self, x: Tensor, clause: Tensor, steps: int, reach: float) -> Tensor:
        """The lowest points (n, ...) on the way of signed gradient steps down the largest row of each one's clause.

        Args:
            clause: of each point, (n,).
            reach: of the first step, as a share of the box; the last one is a fiftieth of it.
        """
        best, lowest = x, torch.full_like(x.flatten(1)[:, 0], torch.inf)
        for step in range(steps + 1):
            with torch.enable_grad():
                point = x.detach().to(self.like).requires_grad_(True)
                value = self.largest(point, clause)
                slope = torch.autograd.grad(value.sum(), point)[0].to(x)
            lower = value.detach() < lowest
            lowest = torch.where(lower, value.detach(), lowest)
            best = torch.where(lower.view(-1, *[1] * (x.dim() - 1)), x, best)
            rate = reach * 0.02 ** (step / max(1, steps - 1))
            x = self.feasible(x - rate * (self.high - self.low) * slope.nan_to_num().sign())
        return best

    def confirmed(self, x: Tensor) -> Tensor | None:
        """The first of some points (n, ...) that is a counterexample, (1, ...): in the model's own computation, and
        for real numbers with all rounding accounted for."""
        x = self.feasible(x)
        with torch.no_grad():
            found = self._violates(self.largest(x)) & self._inside(x)
            for row in found.nonzero().squeeze(1).tolist():
                if self._violates(self._at_most(x[row : row + 1])).item():
                    return x[row : row + 1]
        return None

    def feasible(self, x: Tensor) -> Tensor:
        """Points moved into the set, and to numbers of the model's type."""
        x = torch.minimum(torch.maximum(x, self.low), self.high)
        if self.ball is not None:
            centre, threat = self.ball
            shorter = threat.with_eps(threat.eps * (1 - 1e-6))  # rounding to the model's type moves it again
            x = shorter.project(centre.expand_as(x), x)
        return torch.minimum(torch.maximum(x.to(self.like.dtype).double(), self.low), self.high)

    def largest(self, x: Tensor, clause: Tensor | None = None) -> Tensor:
        """The largest row as the model computes it: of each clause, (n, C), or of one for each point, (n,)."""
        logits = self.model(x.to(self.like)).to(self.rows)
        if clause is None:
            return (torch.einsum("crk,nk->ncr", self.rows, logits) + self.offsets).amax(2)
        return (torch.einsum("nrk,nk->nr", self.rows[clause], logits) + self.offsets[clause]).amax(1)

    def _at_most(self, point: Tensor) -> Tensor:
        """At least the largest row of each clause at one point, as a function of real numbers, (1, C)."""
        rounding = Rounding.of(self.rows.dtype)
        region = Box(Interval.point(point.to(self.rows), rounding))
        values = interval_values(self.graph, region)
        rows = interval_of_rows(self.graph, region, values, self.rows.flatten(0, 1)[None]).interval
        return rounding.above(rows.upper + self.offsets.flatten()).view(1, *self.offsets.shape).amax(2)

    def _violates(self, largest: Tensor) -> Tensor:
        return (largest < 0 if self.strictly else largest <= 0).any(1)

    def _inside(self, x: Tensor) -> Tensor:
        inside = ((x >= self.box[0]) & (x <= self.box[1])).flatten(1).all(1)
        if self.ball is not None:
            inside &= self.ball[1].distance(self.ball[0].expand_as(x), x) <= self.ball[1].eps * (1 - 1e-12)
        return inside
