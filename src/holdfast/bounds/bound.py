"""The methods by their names: ibp, crown-ibp, crown, cap, one-step, alpha-crown, bcp, lmt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor, nn

from holdfast.bounds import budget
from holdfast.bounds.ball import ball_margins, lipschitz_margins
from holdfast.bounds.gains import Gains, certified_gains
from holdfast.bounds.graph import trace
from holdfast.bounds.heads import margins_after, outputs_after
from holdfast.bounds.interval import Interval
from holdfast.bounds.linear import Sweep, intervals, sweep
from holdfast.bounds.operators import Graph
from holdfast.bounds.optimised import one_step_slopes, optimised_margins
from holdfast.bounds.region import Box, Region, region_of, rounded
from holdfast.bounds.relaxation import SlopeRule, slopes_by
from holdfast.bounds.rounding import Arithmetic, Bound, Rounding
from holdfast.bounds.specification import (
    interval_margins,
    interval_of_rows,
    interval_values,
    linear_bounds,
    linear_margins,
)
from holdfast.component import nearest
from holdfast.inference import check_inputs, plain_arithmetic, quiet_door
from holdfast.threat import Threat

MethodName = Literal["ibp", "crown-ibp", "crown", "cap", "one-step", "alpha-crown", "bcp", "lmt"]
METHODS = get_args(MethodName)


class BoundMethod(BaseModel):
    """How the outputs of a network are bounded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: MethodName = "ibp"
    """``ibp`` propagates intervals; ``crown-ibp`` makes one linear backward pass through relaxations on these
    intervals, ``crown`` one from every neuron on the way; ``cap`` is crown with the slopes of Wong and Kolter;
    ``one-step`` is crown-ibp with slopes after one signed gradient step (Lee et al., 2021); ``alpha-crown`` is
    crown with optimised slopes; ``bcp`` cuts balls with boxes and ``lmt`` uses balls alone, both in l_2."""
    relaxation: SlopeRule = "adaptive"
    """Slope of the line below an unstable ReLU."""
    intersect: bool = True
    """Cut what linear passes find, on the way and at the end, with the intervals; the published methods do not."""
    iterations: PositiveInt = 20
    """Gradient steps of alpha-crown."""
    seed: int = 0
    """Of random slopes."""

    @property
    def expensive(self) -> bool:
        """Whether it makes a backward pass from every unstable neuron."""
        return self.method in ("crown", "cap", "alpha-crown")


class Bounder:
    """One graph, whose margins are bounded by one method on any region."""

    def __init__(self, graph: Graph, method: BoundMethod) -> None:
        self.graph, self.method = graph, method
        self._gains: Gains | None = None

    def margins(self, region: Region, y: Tensor) -> Tensor:
        """Lower bounds of z_y − z_j for the classes j ≠ y ascending, (N, K−1)."""
        return self.bound(region, y).lower

    def bound(self, region: Region, y: Tensor) -> Bound:
        """These, and what rounding took from them where the region accounts for it."""
        parts = [self._bound(region.take(some), y[some]) for some in self.pieces(region)]
        found, heads = Bound.joined(parts, 0), self.graph.heads
        return found.through(lambda margins: margins_after(heads, margins)) if heads else found

    def outputs(self, region: Region) -> Interval:
        """The interval of every logit, (N, K)."""
        parts = [self._outputs(region.take(some)) for some in self.pieces(region)]
        return outputs_after(self.graph.heads, Interval.joined(parts))

    def pieces(self, region: Region) -> Sequence[Tensor]:
        """Numbers of the examples that are bounded together, by the memory that their values take."""
        like = region.box.centre
        return torch.arange(len(like), device=like.device).split(self.room(like))

    def room(self, like: Tensor) -> int:
        """So many examples are bounded together, on the device of a tensor."""
        entries = [math.prod(self.graph.shape(value)) for value in range(len(self.graph.nodes) + 1)]
        rows = entries[-1] * max(entries) if self.method.method in ("bcp", "lmt") else 0
        return max(1, budget.of_sweep(like) // (sum(entries) + rows))

    def _bound(self, region: Region, y: Tensor) -> Bound:
        graph, method = self.graph, self.method
        if method.method == "ibp":
            return interval_margins(graph, region, y)
        if method.method in ("bcp", "lmt"):
            if region.rounding is not None and region.rounding.network:
                raise ValueError(
                    f"arithmetic float32 is not stated by {method.method}, whose ball says nothing of torch's "
                    "rounding away from its centre; ibp and crown state it"
                )
            self._gains = self._gains or certified_gains(graph, region.box.centre)
            bound = ball_margins if method.method == "bcp" else lipschitz_margins
            return bound(graph, region, y, self._gains)
        if method.method == "alpha-crown":
            margins = optimised_margins(graph, region, y, method.iterations, method.intersect)
        elif method.method == "one-step":
            slopes = one_step_slopes(graph, region, y, method.seed)
            margins = linear_margins(graph, region, sweep(graph, region, slopes), y)
        else:
            margins = linear_margins(graph, region, self._sweep(region), y)
        if not method.intersect:
            return margins
        return margins._replace(lower=torch.maximum(margins.lower, interval_margins(graph, region, y).lower))

    def _outputs(self, region: Region) -> Interval:
        shape, like = self.graph.shape(len(self.graph.nodes)), region.box.centre
        one = torch.eye(shape[0], dtype=like.dtype, device=like.device)
        if len(shape) == 1:
            logits = interval_of_rows(self.graph, region, interval_values(self.graph, region), one[None]).interval
        else:
            logits = intervals(self.graph, region)[len(self.graph.nodes)]
        if self.method.method == "ibp":
            return logits
        if self.method.method not in ("crown-ibp", "crown", "cap"):
            raise ValueError(f"{self.method.method} bounds margins, not single outputs; crown does")
        done = self._sweep(region)
        both = torch.cat([one, -one])
        found = linear_bounds(self.graph, region, done, lambda some: both.expand(len(some), -1, -1), len(both))
        lower, upper = found.lower.chunk(2, 1)
        crown = Interval.between(lower, -upper, region.rounding)
        return logits.intersect(crown.lower, crown.upper) if self.method.intersect else crown

    def _sweep(self, region: Region) -> Sweep:
        slopes = slopes_by(
            "same-slope" if self.method.method == "cap" else self.method.relaxation, self.method.seed
        )
        return sweep(self.graph, region, slopes, tighten=self.method.expensive, intersect=self.method.intersect)


@quiet_door
def bound_outputs(
    model: nn.Module,
    x: Tensor,
    threat: Threat | tuple[Tensor, Tensor],
    method: str = "ibp",
    *,
    arithmetic: Arithmetic | None = "real",
    **settings: object,
) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds of the logits over the threat set of each input, (N, K) each.

    The model is bounded in eval mode and left as it was; the bounds are differentiable in its parameters.

    Args:
        threat: a threat, or a box as (lower, upper), (N, ...) each, that holds x.
        method: one of ``METHODS``.
        arithmetic: of what network the bounds are true, with all rounding of theirs accounted for in the inputs'
            precision: as a function of ``real`` numbers, or as what torch computes in ``float32``. None for the
            numbers as they are computed, which are the published method's and no guarantee.
        settings: further fields of ``BoundMethod``.

    Raises:
        ValueError: an unknown method; inputs that make no sense.
        UnsupportedOperator: the model holds an operator without a bound rule.
    """
    with plain_arithmetic(x.device):
        bounder, region = _prepared(model, x, threat, method, arithmetic, settings)
        logits = bounder.outputs(region)
    return logits.lower, logits.upper


@quiet_door
def bound_margins(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat | tuple[Tensor, Tensor],
    method: str = "ibp",
    *,
    arithmetic: Arithmetic | None = "real",
    **settings: object,
) -> Tensor:
    """Lower bounds of the margins z_y − z_j over the threat set, classes j ≠ y ascending, (N, K−1).

    An example whose bounds are all positive is certified, unless ``arithmetic`` is None. Otherwise as
    ``bound_outputs``; alpha-crown's bounds are not differentiable, its slopes having been found without a graph.
    """
    with plain_arithmetic(x.device):
        bounder, region = _prepared(model, x, threat, method, arithmetic, settings)
        y, classes = check_inputs(x, y, _wide(threat)), bounder.graph.shape(len(bounder.graph.nodes))[0]
        if len(y) and y.max() >= classes:
            raise ValueError(f"label {y.max().item()} does not fit a model of {classes} classes")
        return bounder.margins(region, y)


def _prepared(
    model: nn.Module,
    x: Tensor,
    threat: Threat | tuple[Tensor, Tensor],
    method: str,
    arithmetic: Arithmetic | None,
    settings: dict[str, object],
) -> tuple[Bounder, Region]:
    check_method(method)
    if arithmetic is not None and arithmetic not in get_args(Arithmetic):
        raise ValueError(f"{arithmetic!r} is no arithmetic; {nearest(arithmetic, get_args(Arithmetic))}")
    chosen = BoundMethod.model_validate({"method": method, **settings})
    check_inputs(x, torch.zeros(len(x), dtype=torch.int64, device=x.device), _wide(threat))
    rounding = arithmetic and Rounding.of(x.dtype, arithmetic)
    region: Region
    if isinstance(threat, Threat):
        region = region_of(x, threat, rounding=rounding)
    else:
        region = Box(_box(x, *threat, rounding))
    return Bounder(trace(model, x, box=(region.box.lower, region.box.upper)), chosen), region


def _wide(threat: Threat | tuple[Tensor, Tensor]) -> Threat:
    return threat if isinstance(threat, Threat) else Threat("linf", 0.0, -torch.inf, torch.inf)


def _box(x: Tensor, lower: Tensor, upper: Tensor, rounding: Rounding | None) -> Interval:
    if lower.shape != x.shape or upper.shape != x.shape or not ((lower <= x) & (x <= upper)).all():
        raise ValueError(f"a box needs lower ≤ x ≤ upper, each of shape {tuple(x.shape)}")
    if not (lower.isfinite() & upper.isfinite()).all():
        raise ValueError("a box needs finite sides: nothing bounds a network on an infinite one")
    ends = rounded(lower.double(), x.dtype, -torch.inf), rounded(upper.double(), x.dtype, torch.inf)
    return Interval.between(*ends, rounding)


def check_method(method: str) -> None:
    """Refuse the name of a method that does not exist."""
    if method not in METHODS:
        raise ValueError(f"{method!r} is not a bound method; {nearest(method, METHODS)}")
