"""Branching: a box in parts, on each of which some ReLUs are known to be active or inactive, and their bounds.

What a part knows of a ReLU's input v, s v ≥ 0 for a sign s, enters its linear bound with a Lagrange multiplier
(beta-CROWN, Wang et al., 2021): for every β ≥ 0 and x in the part, f(x) ≥ f(x) − β s v(x), and the right side is
bounded as any function. Multipliers and slopes ascend the bound; whatever they are, it holds, and rounding is
accounted for as everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from holdfast.bounds import budget
from holdfast.bounds.climbing import Climb
from holdfast.bounds.domains import Domains, Waiting
from holdfast.bounds.interval import Interval
from holdfast.bounds.linear import Costs, LinearBound, Relaxations, backward, is_exact
from holdfast.bounds.operators import Graph, Rectifier
from holdfast.bounds.optimised import Optimised
from holdfast.bounds.region import Box, Region
from holdfast.bounds.relaxation import Lines, Slopes, adaptive, relax
from holdfast.bounds.rounding import STEPS, Cost

SELDOM = 64.0
"""Times the rounding that is met, what is accounted for: a matter of cost, not of soundness."""


@dataclass(frozen=True)
class Held:
    """Lines of a ReLU on a part that has signs for its inputs: −s β is added to what they pull."""

    lines: Lines
    push: Tensor
    """s β, (N, ...)."""
    cost: Cost | None

    def pull(self, a: Tensor) -> tuple[Tensor, Tensor]:
        pulled, offset = self.lines.pull(a)
        return pulled - self.push[:, None], offset

    def take(self, rows: Tensor) -> Held:
        return Held(self.lines.take(rows), self.push[rows], self.cost and self.cost.take(rows))


class Branching:
    """The parts of one region, and their bounds.

    Args:
        region: of one example, with its rounding.
        rows: the specification, (C, R, K): on the whole region each of C clauses has a row with
            ⟨row, logits⟩ + offset > 0.
        offsets: (C, R).
        root: bounds of all C · R rows on the whole region.
        fast: the same network in a precision in which choices are made; bounds are computed in that of ``graph``.
    """

    def __init__(
        self,
        graph: Graph,
        region: Region,
        rows: Tensor,
        offsets: Tensor,
        root: Optimised,
        fast: tuple[Graph, Tensor] | None = None,
    ) -> None:
        self.graph, self.region, self.rows, self.offsets, self.root = graph, region, rows, offsets, root
        self.last = len(graph.nodes)
        self.rectifiers = [n for n, node in enumerate(graph.nodes) if isinstance(node.operator, Rectifier)]
        self.holder = {graph.nodes[n].inputs[0]: n for n in self.rectifiers}
        """By the number of a value, the last ReLU that reads it: where its multipliers are added."""
        others = [n for n, node in enumerate(graph.nodes) if not is_exact(node.operator)]
        self.others = [n for n in others if n not in self.rectifiers]
        """The nodes that no split makes exact."""
        sources = {n: graph.nodes[n].inputs[0] for n in self.rectifiers}
        self.waiting = Waiting(root, {value: graph.shape(value) for value in self.holder}, sources)
        known = region, root.values, rows, offsets, sources, self.holder
        climbing, place = fast or (graph, rows)
        self.climb = Climb(climbing, *known, place.new_empty(0))

    @property
    def batch(self) -> int:
        """So many parts are split at a time, by the memory that bounds of their trial splits take."""
        entries = sum(math.prod(self.graph.shape(value)) for value in range(self.last + 1))
        return max(1, min(64, budget.of_sweep(self.rows) // (16 * entries)))

    def whole(self) -> Domains:
        """The region itself, once for each clause."""
        bounds = self.root.bound.lower.view(self.rows.shape[:2]) + self.offsets
        bounds = _known(bounds - STEPS * self._unit * (bounds.abs() + 2 * self.offsets.abs()))
        lower, best = bounds.max(1)
        clause = torch.arange(len(self.rows), device=self.rows.device)
        place = clause * self.rows.shape[1] + best[clause]
        slopes = {number: self.root.slopes[number][0, place] for number in self.rectifiers}
        shapes = {value: (len(clause), *self.graph.shape(value)) for value in self.holder}
        zeros = {value: lower.new_zeros(shape) for value, shape in shapes.items()}
        return Domains(
            clause,
            lower,
            torch.zeros_like(bounds).scatter(1, best[:, None], 1.0),
            {value: zero.to(torch.int8) for value, zero in zeros.items()},
            slopes,
            zeros,
        )

    @torch.no_grad()
    def bounded(self, domains: Domains, iterations: int, going: Callable[[], bool] = lambda: True) -> Domains:
        """The same with bounds that are no lower, after some steps for slopes, multipliers and weights.

        Args:
            going: asked before each step.
        """
        trial = self.climb.raised(domains, iterations, self._hair, going)
        return _better(domains, trial, self.bounds(trial))

    @torch.no_grad()
    def bounds(self, domains: Domains) -> Tensor:
        """What their slopes, multipliers and weights give, with all rounding accounted for; (M,)."""
        return self._lower(domains, self.relaxations(domains))

    @cached_property
    def _hair(self) -> float:
        """A bound above which what is fast is likely to be right about its sign."""
        slack, unit = self.root.bound.slack, torch.finfo(self.rows.dtype).eps
        fast = torch.finfo(self.climb.place.dtype).eps
        return 0.0 if slack is None else float(slack.max()) * fast / unit / SELDOM

    @torch.no_grad()
    def minimisers(self, domains: Domains) -> Tensor:
        """Where in the region's box the linear bounds of the parts are lowest, (M, ...)."""
        box, found = self.region.box, self.climb.linear(domains)
        return box.centre - box.radius * found.coefficients[:, 0].sign().to(box.centre)

    def relaxations(self, domains: Domains) -> Relaxations:
        """Of every node that is not affine, on each of the parts."""
        found: Relaxations = {}
        for number, node in enumerate(self.graph.nodes):
            if is_exact(node.operator):
                continue
            source = node.inputs[0]
            value, slope = self.value(domains, source), domains.slopes.get(number)
            found[number] = lines = relax(node.operator, value, adaptive if slope is None else _constantly(slope))
            if self.holder.get(source) == number and isinstance(lines, Lines):
                push, cost = domains.multipliers[source] * domains.signs[source], lines.cost
                if cost is not None and (costs := self._costs(domains)) is not None:
                    cost = costs.with_multipliers(source, cost, push)
                found[number] = Held(lines, push, cost)
        return found

    def value(self, domains: Domains, source: int) -> Interval:
        """The interval of a value on each of the parts: the region's, cut at 0 where there is a sign."""
        known = self.root.values[source]
        rows = torch.zeros_like(domains.clause)
        if source not in domains.signs:
            return known.take(rows)
        signs, lower, upper = domains.signs[source], known.lower[rows], known.upper[rows]
        lower = torch.where(signs > 0, lower.clamp(min=0), lower)
        upper = torch.where(signs < 0, upper.clamp(max=0), upper)
        return Interval.between(lower, upper, known.rounding)

    @torch.no_grad()
    def choice(self, domains: Domains, candidates: int = 3) -> Tensor:
        """The neuron that each part is split at, (M,), −1 where none is unstable.

        Of those whose chords cost the bound most (the intercept score of BaBSR, Bunel et al., 2020) the one whose
        halves have the best bounds without a step (filtered smart branching, De Palma et al., 2021).
        """
        open_ends = self.climb.unstable(domains)
        if not open_ends.shape[1]:
            return torch.full_like(domains.clause, -1)
        scores = self.climb.scores(domains).masked_fill(~open_ends, -torch.inf)
        top = scores.topk(min(candidates, scores.shape[1]), 1)
        trials = [self.split(domains, pick) for pick in top.indices.unbind(1)]
        halves = self.climb.bounds(Domains.joined(trials)).view(len(trials), 2, len(domains)).movedim(2, 0)
        worst = halves.amin(2) + 1e-3 * halves.amax(2).clamp(max=0)
        worst = worst.masked_fill(top.values == -torch.inf, -torch.inf)
        pick = top.indices.gather(1, worst.argmax(1, keepdim=True))[:, 0]
        return torch.where(open_ends.any(1), pick, -1)

    def split(self, domains: Domains, pick: Tensor) -> Domains:
        """Both halves of each part, first those with the neuron active; (2 M)."""
        halves = []
        for sign in (1, -1):
            signs, before = {}, 0
            for source, known in domains.signs.items():
                flat = known.flatten(1).clone()
                here = ((pick >= before) & (pick < before + flat.shape[1])).nonzero().squeeze(1)
                flat[here, pick[here] - before] = sign
                signs[source], before = flat.view_as(known), before + flat.shape[1]
            halves.append(replace(domains, signs=signs))
        return Domains.joined(halves)

    @torch.no_grad()
    def leaf(self, domains: Domains) -> tuple[Domains, Tensor] | None:
        """A part on which no ReLU is unstable, with the multipliers of a linear program, and its solution (1, ...).

        The program has a slack for its constraints, at a price above which no multiplier rises: on an empty part
        the bound is that high. What counts is the bound that the multipliers give, not the program's value. None
        where the network is not affine on the part, or the region no box, or nothing is found.
        """
        if self.others or not isinstance(self.region, Box):
            return None
        zero = {source: torch.zeros_like(beta) for source, beta in domains.multipliers.items()}
        lines = self.relaxations(replace(domains, multipliers=zero))
        rows, constants = _affine(backward(self.graph, lines, self.last, self.rows[domains.clause]))
        constants = constants + self.offsets[domains.clause][0].cpu().numpy()
        functions, ends, places = [rows[:0]], [constants[:0]], {}
        for source, signs in domains.signs.items():
            places[source] = place = signs.flatten().nonzero().squeeze(1)
            if not len(place):
                continue
            a = torch.zeros(len(place), signs.numel(), dtype=self.rows.dtype, device=place.device)
            a[torch.arange(len(place)), place] = signs.flatten()[place].to(a)
            inner = {number: line for number, line in lines.items() if number < source}
            function, end = _affine(backward(self.graph, inner, source, a.view(1, len(place), *signs.shape[1:])))
            functions.append(function)
            ends.append(end)
        if not all(np.isfinite(array).all() for array in (rows, constants, *functions, *ends)):
            return None
        solved = _program(rows, constants, np.concatenate(functions), np.concatenate(ends), self.region.box)
        if solved is None:
            return None
        x, weights, duals = solved
        multipliers, rest = {}, self.rows.new_tensor(duals)
        for source, place in places.items():
            multipliers[source] = zero[source].flatten(1).index_fill(1, place, 0)
            multipliers[source][0, place] = rest[: len(place)]
            multipliers[source], rest = multipliers[source].view_as(zero[source]), rest[len(place) :]
        mean = self.rows.new_tensor(weights)[None] if sum(weights) > 0 else domains.weights
        trial = replace(domains, multipliers=multipliers, weights=mean / mean.sum())
        return _better(domains, trial, self.bounds(trial)), self.rows.new_tensor(x).view(1, *self.graph.input_shape)

    def _linear(self, domains: Domains, relaxations: Relaxations) -> LinearBound:
        share = domains.weights / domains.weights.sum(1, keepdim=True)
        a = (share[:, :, None] * self.rows[domains.clause]).sum(1, keepdim=True)
        return backward(self.graph, relaxations, self.last, a, self._costs(domains))

    def _costs(self, domains: Domains) -> Costs | None:
        costs = self.root.base.costs
        return None if costs is None else costs.take(torch.zeros_like(domains.clause))

    def _lower(self, domains: Domains, relaxations: Relaxations) -> Tensor:
        rows = torch.zeros_like(domains.clause)
        found = self._linear(domains, relaxations).minimum(self.region.take(rows)).lower[:, 0]
        share = domains.weights / domains.weights.sum(1, keepdim=True)
        offsets = self.offsets[domains.clause]
        lower = found + (share * offsets).sum(1)
        # The mean row, its offset and the last sum err by shares of what they are made of.
        size = self.root.base.values[self.last].size.flatten(1)[0]
        terms = (share * (self.rows[domains.clause].abs() @ size + 2 * offsets.abs())).sum(1)
        error = (self.rows.shape[1] + len(size) + STEPS) * self._unit * (terms + found.abs())
        return _known(lower - 2 * error.detach())

    @property
    def _unit(self) -> float:
        rounding = self.region.rounding
        return 0.0 if rounding is None else 1.001 * rounding.gamma(1)


def _constantly(slopes: Tensor) -> Slopes:
    return lambda _: slopes


def _known(bounds: Tensor) -> Tensor:
    """What is NaN or infinite, as after an overflow, is no bound."""
    return torch.where(bounds.isfinite(), bounds, -torch.inf)


def _better(best: Domains, trial: Domains, lower: Tensor) -> Domains:
    """Of each part the one with the higher bound."""
    better = lower > best.lower

    def chosen(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(better.view(-1, *[1] * (new.dim() - 1)), new.detach(), old)

    return replace(
        best,
        lower=chosen(lower, best.lower),
        weights=chosen(trial.weights, best.weights),
        slopes={number: chosen(slope, best.slopes[number]) for number, slope in trial.slopes.items()},
        multipliers={source: chosen(beta, best.multipliers[source]) for source, beta in trial.multipliers.items()},
    )


def _affine(bound: LinearBound) -> tuple[np.ndarray, np.ndarray]:
    """The functions of one example as a matrix (S, d) and constants (S,)."""
    constants = bound.of_activations + bound.of_biases
    return bound.coefficients[0].flatten(1).cpu().numpy(), constants[0].cpu().numpy()


def _program(
    rows: np.ndarray, constants: np.ndarray, functions: np.ndarray, ends: np.ndarray, box: Interval
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """The least t + price · s over the box with rows x + constants ≤ t and functions x + ends ≥ −s, by HiGHS: x,
    and the dual values of the two kinds of constraint."""
    scale = np.maximum(np.abs(functions).sum(1), 1e-30)
    price = 1e4 * max(1.0, float(np.abs(rows).sum(1).max()))
    above, held = np.ones((len(rows), 1)), np.ones((len(functions), 1))
    matrix = np.block([[rows, -above, 0 * above], [-functions / scale[:, None], 0 * held, -held]])
    sides = np.stack([end[0].flatten().cpu().numpy() for end in (box.lower, box.upper)], 1)
    bounds = [*map(tuple, sides), (None, None), (0, None)]
    cost = np.append(np.zeros(rows.shape[1]), [1, price])
    found = linprog(cost, matrix, np.append(-constants, ends / scale), bounds=bounds, method="highs")
    if found.status != 0:
        return None
    duals = np.maximum(-found.ineqlin.marginals, 0)
    return found.x[:-2], duals[: len(rows)], duals[len(rows) :] / scale
