"""Slopes that are chosen for the bound they give: one signed gradient step, or alpha-CROWN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.bounds.curved import Bent, Curved, Steep, bent
from holdfast.bounds.interval import Interval
from holdfast.bounds.linear import (
    Costs,
    Relaxations,
    Sweep,
    backward,
    both_ways,
    is_exact,
    is_exact_interval,
    sweep,
    unsettled,
)
from holdfast.bounds.operators import Graph, Rectifier
from holdfast.bounds.region import Region
from holdfast.bounds.relaxation import Slopes, adaptive, relax
from holdfast.bounds.rounding import Bound
from holdfast.bounds.specification import linear_margins, margin_rows, robust_cross_entropy
from holdfast.inference import mix_seed

LIMIT = 2**26
"""Slopes optimised at a time; a network that has more optimises those of the last pass only."""

TANGENT_RATE = 0.05
"""Of Adam, for where lines touch a curved function between the ends of where they may."""

Start = Callable[[int, tuple[int, ...]], Tensor]
"""(number of the node, shape of an example's neurons) → where the slopes start, that shape or (N, *shape)."""


def random_start(seed: int) -> Start:
    """Uniform in [0, 1], the same for every example, so that none hangs on its neighbours."""

    def start(node: int, shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=torch.Generator().manual_seed(mix_seed(seed, node)))

    return start


def one_step_slopes(
    graph: Graph,
    region: Region,
    y: Tensor,
    seed: int = 0,
    *,
    start: Start | None = None,
    loss: Callable[[Sweep], Tensor] | None = None,
) -> Callable[[int], Slopes]:
    """Slopes a = clip(a⁰ − 2 sign ∂loss/∂a⁰, 0, 1) from random ones (Lee et al., 2021, appendix): for each neuron
    the end of [0, 1] that lowers the loss; where the loss does not care, the random slope stays.

    Args:
        start: of the slopes; uniform at random by default.
        loss: (N,), from a sweep with these slopes; by default the cross-entropy of the CROWN-IBP margins.
    """
    begin = start or random_start(seed)
    slopes: dict[int, Tensor] = {}

    def starting(node: int) -> Slopes:
        def draw(value: Interval) -> Tensor:
            first = begin(node, tuple(value.centre.shape[1:])).to(value.centre)
            slopes[node] = first.expand_as(value.centre).clone().requires_grad_(True)
            return slopes[node]

        return draw

    with torch.enable_grad():
        plain = region.plain()
        done = sweep(graph, plain, starting)
        values = loss(done) if loss else robust_cross_entropy(linear_margins(graph, plain, done, y).lower)
        used = list(slopes.items())
        leaves = [slope for _, slope in used]
        asked = leaves and values.requires_grad
        gradients = torch.autograd.grad(values.sum(), leaves, allow_unused=True) if asked else [None] * len(leaves)
    chosen = {
        node: slope.detach() if gradient is None else (slope.detach() - 2 * gradient.sign()).clamp(0, 1)
        for (node, slope), gradient in zip(used, gradients, strict=True)
    }
    return lambda node: lambda value: chosen[node]


@dataclass
class _Pass:
    """A backward pass whose slopes are optimised: from neurons of a value, or from functions of the logits."""

    value: int
    owner: Tensor
    neuron: Tensor | None
    a: Tensor
    slopes: dict[int, Tensor]
    """By the number of the node, of the lines below a ReLU, (M, S, ...); of a curved function where the lines below
    and above touch it, (M, S, 2, ...)."""

    def bound(
        self, graph: Graph, region: Region, values: dict[int, Interval], costs: Costs | None, curves: Curves
    ) -> Bound:
        """(M, S).

        Args:
            values: on which relaxations are made; those inside, where rounding has its ``costs``, may be wider.
        """
        relaxations: Relaxations = {}
        for number, node in enumerate(graph.nodes[: self.value]):
            if is_exact(node.operator):
                continue
            value, slopes = values[node.inputs[0]], self.slopes.get(number)
            if slopes is None:
                relaxations[number] = relax(node.operator, value.take(self.owner), adaptive)
            elif isinstance(node.operator, Curved | Steep):
                relaxations[number] = curves.of(number, node.operator, value).take(self.owner).lines(slopes)
            else:
                relaxations[number] = relax(node.operator, value.take(self.owner), _constantly(slopes))
        mine = costs and costs.take(self.owner)
        return backward(graph, relaxations, self.value, self.a, mine).minimum(region.take(self.owner))


class Curves:
    """Curved functions on the intervals they were last asked about."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[Interval, Bent]] = {}

    def of(self, number: int, operator: Curved | Steep, value: Interval) -> Bent:
        """That of a node on the interval of its input."""
        if number not in self.known or self.known[number][0] is not value:
            self.known[number] = value, bent(operator, value)
        return self.known[number][1]


def _constantly(slopes: Tensor) -> Slopes:
    return lambda _: slopes


@dataclass(frozen=True)
class Optimised:
    """What alpha-CROWN found of S functions of the logits, for each of N examples."""

    bound: Bound
    """The best of each function, (N, S)."""
    base: Sweep
    """CROWN, from which it began."""
    values: dict[int, Interval]
    """By the number of the value, as narrow as the passes on the way have made them."""
    slopes: dict[int, Tensor]
    """By the number of the node, those of the last pass from the logits: (N, S, ...) of a ReLU, and of a curved
    function where its lines touch, (N, S, 2, ...)."""


def optimised_margins(graph: Graph, region: Region, y: Tensor, iterations: int, intersect: bool = True) -> Bound:
    """alpha-CROWN (Xu et al., 2021): lower bounds of z_y − z_j, (N, K−1), as ``optimised`` finds them."""
    rows = margin_rows(y, graph.shape(len(graph.nodes))[0], region.box.centre.dtype)
    found = optimised(graph, region, rows, iterations, intersect)
    if found is not None:
        return found.bound
    # too many at a time: whether an example is optimised whole is its own affair
    halves = torch.arange(len(y), device=y.device).chunk(2)
    parts = [optimised_margins(graph, region.take(half), y[half], iterations, intersect) for half in halves]
    slacks = [part.slack for part in parts if part.slack is not None]
    return Bound(torch.cat([part.lower for part in parts]), torch.cat(slacks) if slacks else None)


def optimised(
    graph: Graph,
    region: Region,
    rows: Tensor,
    iterations: int,
    intersect: bool = True,
    enough: Callable[[Tensor], bool] = lambda bounds: False,
    *,
    base: Sweep | None = None,
    limit: int | None = None,
) -> Optimised | None:
    """Lower bounds of functions of the logits (N, S, K), with the slopes that raise them.

    Every backward pass, from each unstable neuron and each function, has slopes of its own; all of them ascend
    the sum of the bounds (Adam, 0.98^t times 0.5, or ``TANGENT_RATE`` where lines touch curved functions), and the
    best bound of each function is kept. Not differentiable in the weights. None where several examples have too
    many slopes together.

    Args:
        enough: whether bounds (N, S) are good enough to stop at.
        base: CROWN, where it is at hand.
        limit: slopes optimised at a time, ``LIMIT`` by default.
    """
    with torch.no_grad():
        base = base or sweep(graph, region, lambda _: adaptive, tighten=True, intersect=intersect)
        best = base.bound(graph, region, len(graph.nodes), rows)
    passes = _passes(graph, region, base, rows, LIMIT if limit is None else limit)
    if passes is None:
        return None
    leaves, values = [slope for one in passes for slope in one.slopes.values()], dict(base.values)

    def found() -> Optimised:
        return Optimised(best, base, values, {node: slope.detach() for node, slope in passes[-1].slopes.items()})

    if not leaves or not len(rows):
        return found()
    rectifiers = {n for n, node in enumerate(graph.nodes) if isinstance(node.operator, Rectifier)}
    rates = [0.5 if node in rectifiers else TANGENT_RATE for one in passes for node in one.slopes]
    groups = [{"params": [leaf], "lr": rate} for leaf, rate in zip(leaves, rates, strict=True)]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    for _ in range(iterations):
        if enough(best.lower):
            return found()
        with torch.enable_grad():
            bounds = _bounds(graph, region, base, passes, values)
            gradients = torch.autograd.grad(-bounds.lower.sum(), leaves, allow_unused=True)
        best = best._replace(lower=torch.maximum(best.lower, bounds.lower.detach()))
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for leaf in leaves:
                leaf.clamp_(0, 1)
    with torch.no_grad():
        last = _bounds(graph, region, base, passes, values).lower
    best = best._replace(lower=torch.maximum(best.lower, last))
    return found()


def _bounds(graph: Graph, region: Region, base: Sweep, passes: list[_Pass], values: dict[int, Interval]) -> Bound:
    """The bounds (N, S) after one round of all passes, each on the intervals that those before it left.

    Args:
        values: what is known on the way, of which the narrower is kept.
    """
    now, curves = dict(values), Curves()
    for inner in passes[:-1]:
        bounds, known = inner.bound(graph, region, now, base.costs, curves).lower, now[inner.value]
        lower, upper, place = known.lower.flatten(1), known.upper.flatten(1), (inner.owner, inner.neuron)
        low, high = bounds[:, 0], -bounds[:, 1]
        # Nothing known before is given up, but slopes that are worse today are still told how to get better.
        low = torch.maximum(low, lower[place]).detach() + (low - low.detach())
        high = torch.minimum(high, upper[place]).detach() + (high - high.detach())
        low, high = torch.minimum(low, high), torch.maximum(low, high)  # should rounding cross them
        lower, upper = lower.index_put(place, low), upper.index_put(place, high)
        ends = lower.view_as(known.centre), upper.view_as(known.centre)
        now[inner.value] = Interval.between(*ends, region.rounding)
        values[inner.value] = Interval.between(ends[0].detach(), ends[1].detach(), region.rounding)
    return passes[-1].bound(graph, region, now, base.costs, curves)


def _passes(graph: Graph, region: Region, base: Sweep, rows: Tensor, limit: int) -> list[_Pass] | None:
    """One for each value that a relaxation reads, but for those that intervals know exactly; the functions
    (N, S, K) of the logits last.

    None where several examples have too many slopes together; one alone has then the last pass only.
    """
    last, like = len(graph.nodes), region.box.centre
    everyone = torch.arange(len(rows), device=rows.device)
    final = _Pass(last, everyone, None, rows, _starting(graph, base, last, everyone, rows.shape[1]))
    inner: list[_Pass] = []
    for number in sorted(base.relaxations):
        source = graph.nodes[number].inputs[0]
        if is_exact_interval(graph, region, source):
            continue
        owner, neuron = unsettled(graph.nodes[number].operator, base.values[source]).flatten(1).nonzero().T
        slopes = _starting(graph, base, source, owner, 2)
        a = both_ways(owner, neuron, graph.shape(source), like)
        inner.append(_Pass(source, owner, neuron, a, slopes))
        if sum(slope.numel() for one in inner for slope in one.slopes.values()) > limit:
            return [final] if len(rows) == 1 else None
    return [*inner, final]


def _starting(graph: Graph, base: Sweep, value: int, owner: Tensor, functions: int) -> dict[int, Tensor]:
    """Slopes below every ReLU before a value and tangents of every curved function, as a sweep has them, for M
    examples and S functions of each."""
    slopes = {}
    for number in base.relaxations:
        operator, source = graph.nodes[number].operator, base.values[graph.nodes[number].inputs[0]]
        if number >= value or not isinstance(operator, Rectifier | Curved | Steep):
            continue
        first = adaptive(source) if isinstance(operator, Rectifier) else bent(operator, source).starts
        first = first.detach()[owner]
        slopes[number] = first[:, None].repeat(1, functions, *[1] * (first.dim() - 1)).requires_grad_(True)
    return slopes
