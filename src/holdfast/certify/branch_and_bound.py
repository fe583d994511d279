"""Complete verification: what bounds and attacks leave open is split, and each part bounded, until all is decided
or the time is up (see ``decision``)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from holdfast.bounds.bound import BoundMethod
from holdfast.bounds.graph import trace
from holdfast.bounds.heads import margins_after
from holdfast.bounds.interval import Interval
from holdfast.bounds.operators import Graph
from holdfast.bounds.region import Box, region_of, rounded
from holdfast.bounds.rounding import Rounding
from holdfast.bounds.specification import margin_rows
from holdfast.certify.bounds import BoundCertifier
from holdfast.certify.certificate import Certifier, Deterministic, Findings, Tell
from holdfast.certify.clock import Clock
from holdfast.certify.counterexample import Falsifier
from holdfast.certify.decision import Fast, Verification, decided
from holdfast.certify.double import in_float64
from holdfast.inference import door, frozen_eval, plain_arithmetic
from holdfast.threat import Threat


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
    clock, started = Clock.of(seconds), time.perf_counter()
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
        found = decided(network.graph, region, clauses, constants, falsifier, clock, network.fast)
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
    fast: Fast | None
    """In the model's own precision, where it is another."""

    @classmethod
    def of(cls, model: nn.Module, x: Tensor, ends: tuple[Tensor, Tensor]) -> _Network:
        try:
            exact, place = in_float64(model, x)
        except ValueError:  # it cannot be copied
            exact, place = model, x.new_empty(0)
        graph, fast = trace(exact, x.to(place), box=(ends[0].to(place), ends[1].to(place))), None
        if place.dtype != x.dtype and place.device == x.device:
            own = trace(model, x, box=(ends[0].to(x), ends[1].to(x)))
            alike = [node.inputs for node in own.nodes] == [node.inputs for node in graph.nodes]
            fast = (own, x.new_empty(0)) if alike else None
        return cls(graph, place, fast)


class _Cheap(BoundCertifier):
    """ibp, then crown-ibp: what takes batches of images a moment."""

    def _stages(self) -> list[BoundMethod]:
        return [stage for stage in super()._stages() if not stage.expensive]


class BranchAndBoundCertifier(Deterministic, name="branch-and-bound"):
    """Verified or refuted, image by image, up to a time limit: what ibp and crown-ibp leave open is attacked,
    bounded by crown and alpha-crown, and then split.

    Complete for networks of ReLUs and affine layers in l_inf, given the time and but for margins as small as
    rounding; of others boxes of inputs are halved, which decides what has few inputs. Where the answer is no,
    the certificate holds the counterexample. Deterministic, apart from where the clock ends it.
    """

    seconds: PositiveFloat = 10.0
    """For each image that ibp and crown-ibp leave open, all further methods together."""

    @property
    def in_training(self) -> Certifier:
        return BoundCertifier(method="cascade", radius_search="never")

    @property
    def finds_radii(self) -> bool:
        return False

    @property
    def brief(self) -> BranchAndBoundCertifier:
        return self.model_copy(update={"seconds": min(self.seconds, 1.0)})

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
        """First all that the cheap bounds decide, then what they leave open, one by one."""
        if self.arithmetic != "real":
            raise ValueError("branch-and-bound states arithmetic real alone; crown states float32")
        cheap, left = _Cheap(method="cascade", radius_search="never"), []
        silent: Tell = lambda examples, samples: None  # noqa: E731
        for places, found in cheap.findings(model, x, y, threat, seed, batch_size, silent, numbers):
            error, nothing = found.error, torch.full_like(x[places.to(x.device)], torch.nan)
            assert error is not None
            found = replace(found, counterexample=nothing)
            open_ends = (found.prediction == y[places.to(y.device)]) & (found.radius < threat.eps) & ~error
            rows = open_ends.cpu().nonzero().squeeze(1)
            left += [(int(places[row]), found.take(row[None])) for row in rows]
            if len(rows) < len(places):
                done = (~open_ends).cpu().nonzero().squeeze(1)
                yield places[done], found.take(done)
        tell(len(left), 0)
        network = _Network.of(model, x[:1], threat.interval(x[:1].double())) if left else None
        for number, (row, found) in enumerate(left, 1):
            assert network is not None
            one = slice(row, row + 1)
            yield torch.tensor([row]), self._settled(found, network, model, x[one], y[one], threat)
            tell(len(left) - number, 0)

    def _settled(
        self, found: Findings, network: _Network, model: nn.Module, x: Tensor, y: Tensor, threat: Threat
    ) -> Findings:
        """What is found of one image that cheap bounds left open."""
        margin, excluded, seconds = found.margin, found.excluded, found.seconds
        assert margin is not None
        assert excluded is not None
        assert seconds is not None
        started = time.perf_counter()
        answer = self._decided(network, model, x, y, threat)
        seconds = seconds + time.perf_counter() - started
        found = replace(found, method=[answer.by], seconds=seconds, margin=margin.clamp(min=answer.bound))
        if answer.verdict == "proved":
            radius, excluded = torch.full_like(found.radius, threat.eps), torch.ones_like(excluded)
            return replace(found, radius=radius, excluded=excluded)
        if answer.counterexample is not None:
            return replace(found, counterexample=answer.counterexample.to(x))
        return found

    def _decided(self, network: _Network, model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Verification:
        """Of one image."""
        clock, (graph, place, fast) = Clock.of(self.seconds), network
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
        found = decided(graph, region, rows, offsets, falsifier, clock, fast)
        if not graph.heads or not math.isfinite(found.bound):
            return found
        margins = rows.new_full((1, len(rows)), found.bound)
        return replace(found, bound=margins_after(graph.heads, margins).amin().item())
