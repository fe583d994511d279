"""Slopes, multipliers and weights that raise the bounds of parts, found in whatever precision is fast.

Nothing here accounts for rounding: whatever is found is a choice, and what bounds it gives is for others to say
(see ``branching``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from holdfast.bounds.domains import Domains
from holdfast.bounds.interval import Interval
from holdfast.bounds.linear import LinearBound, backward, is_exact
from holdfast.bounds.operators import Graph, Rectifier
from holdfast.bounds.region import Ball, Box, Region
from holdfast.bounds.relaxation import Relaxation, adaptive, relax
from holdfast.bounds.rounding import dots

RATES = 0.1, 0.05, 0.1
"""Of Adam, for slopes, multipliers and weights."""
FORGET = 0.9, 0.999
SHRINK = 0.75
"""Once no more than this share of the parts has a bound to be raised, the others are left out."""


@dataclass(frozen=True)
class _Triangle:
    """A ReLU on M parts, for one function of each: −s β is added to what it pulls."""

    lower_slope: Tensor
    upper_slope: Tensor
    upper_offset: Tensor
    push: Tensor | None
    """s β."""
    cost: None = None

    def pull(self, a: Tensor) -> tuple[Tensor, Tensor]:
        below = a.clamp(min=0)
        above = a - below
        pulled = above * self.upper_slope[:, None] + below * self.lower_slope[:, None]
        if self.push is not None:
            pulled = pulled - self.push[:, None]
        return pulled, dots(above, self.upper_offset)

    def take(self, rows: Tensor) -> Relaxation:
        raise TypeError("the parts were taken before")


class _Shape:
    """What the ReLUs of M parts are, but for slopes and multipliers."""

    def __init__(self, signs: Tensor, upper_slope: Tensor, upper_offset: Tensor, stable: Tensor) -> None:
        self.signs, self.upper_slope, self.upper_offset, self.stable = signs, upper_slope, upper_offset, stable
        """Flat over the ReLUs, (M, neurons) each; ``stable`` is the slope where there is but one, else NaN."""

    def take(self, rows: Tensor) -> _Shape:
        return _Shape(*(column[rows] for column in vars(self).values()))


class Climb:
    """The parts of one region, in the precision of a graph.

    Args:
        graph: the network's operators, numbered as those that the parts are of.
        region: of one example.
        values: intervals of all values on the region.
        rows, offsets: (C, R, K), (C, R).
        sources: by the number of a ReLU, the value that it reads.
        holder: by the number of a value, the ReLU at which its multipliers are added.
    """

    def __init__(
        self,
        graph: Graph,
        region: Region,
        values: Mapping[int, Interval],
        rows: Tensor,
        offsets: Tensor,
        sources: Mapping[int, int],
        holder: Mapping[int, int],
        place: Tensor,
    ) -> None:
        self.graph, self.last, self.place = graph, len(graph.nodes), place
        self.region, self.rows, self.offsets = _plainly(region, place), rows.to(place), offsets.to(place)
        self.sources, self.holds = sources, set(holder.values())
        self.lower, self.upper = (
            {s: getattr(values[s], end).to(place) for s in sources.values()} for end in ("lower", "upper")
        )
        others = [n for n, node in enumerate(graph.nodes) if n not in sources and not is_exact(node.operator)]
        self.others = {
            n: relax(graph.nodes[n].operator, _plain(values[graph.nodes[n].inputs[0]], place), adaptive)
            for n in others
        }
        self.sizes = [self.lower[source][0].numel() for source in sources.values()]

    def raised(self, domains: Domains, steps: int, enough: float, going: Callable[[], bool]) -> Domains:
        """The same parts with what raised their bounds most; bounds themselves are as they were.

        Args:
            enough: a bound at which a part is left alone.
            going: asked before each step.
        """
        here = torch.arange(len(domains), device=self.place.device)
        shape, clause = self._shape(domains), domains.clause
        leaves = self._leaves(domains)
        best, found = [leaf.clone() for leaf in leaves], self.place.new_full((len(domains),), -torch.inf)
        moments = [(torch.zeros_like(leaf), torch.zeros_like(leaf)) for leaf in leaves]
        for step in range(1, steps + 2):
            last = step > steps or not going()
            with torch.set_grad_enabled(not last):
                asked = [leaf.requires_grad_(not last) for leaf in leaves]
                lower = self._bound(clause[here], shape, *asked)
                gradients = () if last else torch.autograd.grad(lower.sum(), asked)
            lower, leaves = lower.detach(), [leaf.detach() for leaf in leaves]
            better = (lower > found[here]).nonzero().squeeze(1)
            found[here[better]] = lower[better]
            for whole, leaf in zip(best, leaves, strict=True):
                whole[here[better]] = leaf[better]
            if last:
                break
            _adam(leaves, gradients, moments, step)
            _confine(*leaves)
            open_ends = (lower <= enough).nonzero().squeeze(1)
            if not len(open_ends):
                break
            if len(open_ends) <= SHRINK * len(here):
                here, shape = here[open_ends], shape.take(open_ends)
                leaves = [leaf[open_ends] for leaf in leaves]
                moments = [(first[open_ends], second[open_ends]) for first, second in moments]
        return self._with(domains, best)

    @torch.no_grad()
    def bounds(self, domains: Domains) -> Tensor:
        """As they are, (M,)."""
        return self._bound(domains.clause, self._shape(domains), *self._leaves(domains))

    @torch.no_grad()
    def linear(self, domains: Domains) -> LinearBound:
        """The linear functions of the input that are these bounds, (M, 1, ...)."""
        return self._linear(domains.clause, self._shape(domains), *self._leaves(domains))

    def scores(self, domains: Domains) -> Tensor:
        """What the offsets of the chords take from the bound, flat over the values that ReLUs read, (M, neurons):
        the derivative by an offset times itself."""
        shape = self._shape(domains)
        with torch.enable_grad():
            shape.upper_offset = offset = shape.upper_offset.detach().requires_grad_(True)
            lower = self._bound(domains.clause, shape, *self._leaves(domains))
            (slope,) = torch.autograd.grad(lower.sum(), offset, allow_unused=True)
        offset = offset.detach()
        taken = torch.zeros_like(offset) if slope is None else -slope * offset
        return self._by_value(taken + 1e-9 * offset)  # any rather than none

    def unstable(self, domains: Domains) -> Tensor:
        """Which neurons may be either, flat over the values that ReLUs read; (M, neurons)."""
        return self._by_value(self._shape(domains).stable.isnan().to(self.place)) > 0

    def _by_value(self, flat: Tensor) -> Tensor:
        """The sums over the ReLUs that read each value."""
        found: dict[int, Tensor] = {}
        for source, part in zip(self.sources.values(), flat.split(self.sizes, 1), strict=True):
            found[source] = found[source] + part if source in found else part
        return torch.cat(list(found.values()), 1) if found else flat

    def _shape(self, domains: Domains) -> _Shape:
        columns: list[tuple[Tensor, ...]] = []
        for number, source in self.sources.items():
            signs, leak = domains.signs[source], self._leak(number)
            lower, upper = self.lower[source], self.upper[source]
            lower = torch.where(signs > 0, lower.clamp(min=0), lower)
            upper = torch.where(signs < 0, upper.clamp(max=0), upper)
            low, high = lower.clamp(max=0), upper.clamp(min=0)
            chord = leak + (1 - leak) * high / torch.where(high > low, high - low, 1)
            stable = torch.where(lower >= 0, 1.0, leak).to(low)
            stable = torch.where((lower < 0) & (upper > 0), torch.nan, stable)
            held = signs.to(low) if number in self.holds else torch.zeros_like(low).expand(signs.shape)
            columns.append(tuple(t.flatten(1) for t in (held, chord, (leak - chord) * low, stable)))
        if not columns:
            return _Shape(*(self.place.new_zeros(len(domains), 0) for _ in range(4)))
        return _Shape(*(torch.cat(parts, 1) for parts in zip(*columns, strict=True)))

    def _leak(self, number: int) -> float:
        operator = self.graph.nodes[number].operator
        assert isinstance(operator, Rectifier)
        return operator.leak

    def _leaves(self, domains: Domains) -> list[Tensor]:
        """Slopes and multipliers flat over the ReLUs, and weights: (M, neurons), (M, neurons), (M, R)."""
        slopes = [domains.slopes[number].flatten(1) for number in self.sources]
        beta = [domains.multipliers[source].flatten(1) for source in self.sources.values()]
        nothing = domains.weights.new_zeros(len(domains), 0)
        flat = [torch.cat(part, 1) if part else nothing for part in (slopes, beta)]
        return [leaf.to(self.place) for leaf in (*flat, domains.weights)]

    def _with(self, domains: Domains, leaves: Sequence[Tensor]) -> Domains:
        like = domains.lower
        slopes, multipliers, weights = (leaf.to(like) for leaf in leaves)
        each = zip(self.sources.items(), slopes.split(self.sizes, 1), multipliers.split(self.sizes, 1), strict=True)
        of_node, of_value = dict(domains.slopes), dict(domains.multipliers)
        for (number, source), slope, beta in each:
            of_node[number] = slope.view_as(domains.slopes[number])
            if number in self.holds:
                of_value[source] = beta.view_as(domains.multipliers[source])
        return replace(domains, slopes=of_node, multipliers=of_value, weights=weights)

    def _linear(self, clause: Tensor, shape: _Shape, slopes: Tensor, beta: Tensor, weights: Tensor) -> LinearBound:
        share = weights / weights.sum(1, keepdim=True)
        a = (share[:, :, None] * self.rows[clause]).sum(1, keepdim=True)
        return backward(self.graph, dict(self._relaxations(shape, slopes, beta)), self.last, a)

    def _bound(self, clause: Tensor, shape: _Shape, slopes: Tensor, beta: Tensor, weights: Tensor) -> Tensor:
        found = self._linear(clause, shape, slopes, beta, weights)
        share = weights / weights.sum(1, keepdim=True)
        lower = found.minimum(self.region.take(torch.zeros_like(clause))).lower[:, 0]
        return lower + (share * self.offsets[clause]).sum(1)

    def _relaxations(self, shape: _Shape, slopes: Tensor, beta: Tensor) -> Iterator[tuple[int, Relaxation]]:
        rows = torch.zeros(len(slopes), dtype=torch.int64, device=self.place.device)
        for number, relaxation in self.others.items():
            yield number, relaxation.take(rows)
        split = (part.split(self.sizes, 1) for part in (slopes, beta, *vars(shape).values()))
        for (number, source), *parts in zip(self.sources.items(), *split, strict=True):
            size, leak = self.lower[source].shape[1:], self._leak(number)
            slope, beta_here, signs, chord, offset, stable = (part.view(-1, *size) for part in parts)
            below = torch.where(stable.isnan(), leak + (1 - leak) * slope, stable)
            push = beta_here * signs if number in self.holds else None
            yield number, _Triangle(below, chord, offset, push)


def _plain(value: Interval, place: Tensor) -> Interval:
    return Interval.between(value.lower.to(place), value.upper.to(place))


def _plainly(region: Region, place: Tensor) -> Region:
    """The set in another precision, its rounding forgotten."""
    if isinstance(region, Ball):
        return Ball(region.x.to(place), region.threat, region.eps.to(place), _plain(region.around, place))
    return Box(_plain(region.box, place))


def _adam(
    leaves: list[Tensor], gradients: Sequence[Tensor], moments: list[tuple[Tensor, Tensor]], step: int
) -> None:
    """One step upwards, in place (Kingma & Ba, 2015)."""
    first, second = FORGET
    for leaf, gradient, (mean, square), rate in zip(leaves, gradients, moments, RATES, strict=True):
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        scale = (square / (1 - second**step)).sqrt_().add_(1e-8)
        leaf.addcdiv_(mean, scale, value=rate / (1 - first**step))


def _confine(slopes: Tensor, beta: Tensor, weights: Tensor) -> None:
    slopes.clamp_(0, 1)
    beta.clamp_(min=0)
    weights.clamp_(min=0)
    weights.masked_fill_(weights.sum(1, keepdim=True) == 0, 1.0)
    weights.div_(weights.sum(1, keepdim=True))
