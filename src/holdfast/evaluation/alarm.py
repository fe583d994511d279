"""The alarm: whether a point where the model errs contradicts what is certified there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from holdfast.bounds.rounding import Arithmetic
from holdfast.certify import SoundnessError
from holdfast.certify.double import in_float64
from holdfast.inference import frozen_eval, plain_arithmetic, predict
from holdfast.search import per_example
from holdfast.threat import Threat

UNSURE = 2.0**9
"""Roundings of the largest logit by which a margin may be off: one that is no farther below 0 contradicts
nothing."""

HAIR = 1e-3
"""A point that is farther than a certified radius by so small a share is drawn into the ball and looked at again: a
matter of what is looked at, not of what contradicts."""


class Points(NamedTuple):
    """Where somebody looked for an error, around M examples."""

    x: Tensor
    """The examples, (M, ...)."""
    y: Tensor
    """(M,)."""
    x_adv: Tensor
    """(M, ...), of any floating type."""
    numbers: Tensor
    """Of the examples in the table, (M,)."""

    def take(self, rows: Tensor) -> Points:
        """Some of them."""
        return Points(*(column[rows.to(column.device)] for column in self))


class Claim(NamedTuple):
    """What a certifier says of M examples."""

    name: str
    radius: Tensor
    """The prediction holds in the closed ball, (M,) float64; below 0 where nothing is said."""
    arithmetic: Arithmetic | None = "real"
    """Of what torch computes in ``float32``, or of the network as a function of ``real`` numbers, as is meant where
    nothing is said."""

    def take(self, rows: Tensor) -> Claim:
        """What it says of some of them."""
        return self._replace(radius=self.radius[rows.to(self.radius.device)])


def claims_of(table: pd.DataFrame, names: Sequence[str], certifiers: Mapping[str, Any]) -> list[Claim]:
    """What these certifiers say of the right examples of a table.

    Args:
        certifiers: by their names, those that are at hand: they know the arithmetic.
    """
    claims = []
    for name in names:
        radius = torch.from_numpy(table[f"{name}.radius"].to_numpy().astype(float))
        silent = torch.from_numpy(~table["correct"].to_numpy()) | (radius <= 0)
        claims.append(
            Claim(name, radius.masked_fill(silent, -1.0), getattr(certifiers.get(name), "arithmetic", None))
        )
    return claims


class Watch:
    """Holds points against certificates of one classifier.

    An error outside the closed ball of the certified radius, by the distance in float64, contradicts nothing; one
    that lies a hair outside, as attacks round, is drawn into it and looked at again. Nor does an error of float32
    where the network as a function of real numbers is right, unless the certificate speaks of float32: such
    examples are kept in ``disagreements``. Where the model cannot be had in float64 its own answer stands for it.
    """

    def __init__(self, classifier: nn.Module, x: Tensor, threat: Threat) -> None:
        self.classifier, self.threat = classifier, threat
        self._like = x[:1]
        self.disagreements: dict[int, float] = {}
        """The examples around which float32 errs and the real network does not, within a certificate, and by what
        margin."""

    @cached_property
    def _exact(self) -> tuple[nn.Module, Tensor] | None:
        try:
            with frozen_eval(self.classifier):
                exact, place = in_float64(self.classifier, self._like)
                predict(exact, self._like.to(place))
        except torch.OutOfMemoryError:  # which says nothing of float64
            raise
        except (ValueError, RuntimeError):  # whatever a foreign forward makes of float64
            return None
        return exact, place

    def margins(self, points: Points) -> tuple[Tensor, Tensor, Tensor]:
        """z_y − max_{j≠y} z_j as the model answers at the nearest points of its own precision that are no farther
        from x, of the real network at the points as they are, and what the latter may be off by; (M,) float64 on
        the CPU each."""
        with frozen_eval(self.classifier), plain_arithmetic(points.x.device):
            logits = predict(self.classifier, rounded_towards(points.x, points.x_adv))
        seen = exact = margin(logits, points.y)
        if self._exact is not None:
            model, place = self._exact
            with frozen_eval(model), plain_arithmetic(place.device):
                logits = predict(model, points.x_adv.to(place))
            exact = margin(logits, points.y)
        return seen, exact, UNSURE * torch.finfo(logits.dtype).eps * logits.abs().amax(1).cpu().double()

    def check(self, by: str, claims: list[Claim], points: Points, *, wrong: bool = False) -> Tensor:
        """Ring where a point contradicts one of the claims; the least margin in float64 that was seen within them,
        (M,), inf where no claim reaches.

        Args:
            by: who found the points.
            wrong: the model was seen to err there, whatever it answers when it is asked again.

        Raises:
            SoundnessError: naming the first example of the first such claim.
        """
        least = torch.full((len(points.y),), torch.inf, dtype=torch.float64)
        for claim in claims:
            least = torch.minimum(least, self._check(by, claim, points, wrong))
        return least

    def _check(self, by: str, claim: Claim, points: Points, wrong: bool) -> Tensor:
        radius, distance = claim.radius.cpu(), exact_distance(self.threat, points.x, points.x_adv)
        rows = (distance <= radius * (1 + HAIR)).nonzero().squeeze(1)
        found = torch.full_like(distance, torch.inf)
        if not len(rows):
            return found
        inside, near = (distance <= radius)[rows], points.take(rows.to(points.x.device))
        near = near._replace(x_adv=drawn_in(self.threat, near.x, near.x_adv, radius[rows]))
        distance = exact_distance(self.threat, near.x, near.x_adv)
        seen, exact, error = self.margins(near)
        seen = torch.where(inside & wrong, seen.clamp(max=0), seen)
        # An exact tie is no rounding.
        stands = seen > 0 if claim.arithmetic == "float32" else (exact > -error) & (exact != 0)
        reached = distance <= radius[rows]
        told = reached & stands & (seen <= 0)
        self.disagreements |= dict(zip(near.numbers.cpu()[told].tolist(), exact[told].tolist(), strict=True))
        against = (reached & ~stands).nonzero().squeeze(1)
        if len(against):
            first = near.take(against)
            if seen[against[0]] <= 0:  # it shows in the model's own precision
                first = first._replace(x_adv=rounded_towards(first.x, first.x_adv))
            _ring(claim.name, radius[rows][against], by, distance[against], first, self.threat)
        found[rows] = exact.masked_fill(~reached, torch.inf)
        return found


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """z_y − max_{j≠y} z_j, (N,) float64 on the CPU."""
    logits, y = logits.cpu().double(), y.cpu()[:, None]
    return (logits.gather(1, y) - logits.scatter(1, y, -torch.inf).amax(1, keepdim=True)).squeeze(1)


def exact_distance(threat: Threat, x: Tensor, x_adv: Tensor) -> Tensor:
    """‖x_adv − x‖ of the numbers as they are, in float64, (N,), on the CPU."""
    return threat.distance(x.cpu().double(), x_adv.cpu().double())


def drawn_in(threat: Threat, x: Tensor, x_adv: Tensor, radius: Tensor) -> Tensor:
    """Points in float64, those outside the closed balls (N,) moved straight towards x into them; on the CPU.

    In l_0, where that changes no distance, they stay.
    """
    x, x_adv = x.cpu().double(), x_adv.cpu().double()
    distance = threat.distance(x, x_adv)
    share = torch.where(distance > radius, radius / distance * (1 - 2.0**-40), 1.0)
    moved = x + per_example(share, x) * (x_adv - x)
    return torch.where(per_example(distance > radius, x), moved, x_adv)


def rounded_towards(x: Tensor, points: Tensor) -> Tensor:
    """The nearest points of the type of x, on its device, but entry by entry no farther from it, (N, ...)."""
    points = points.cpu().double()
    near, center = points.to(x.dtype), x.cpu()
    farther = (near.double() - center.double()).abs() > (points - center.double()).abs()
    return torch.where(farther, torch.nextafter(near, center), near).to(x.device)


def disagreement(margins: dict[int, float]) -> list[str]:
    """The warning that float32 errs where the real network is certified to be right."""
    if not margins:
        return []
    examples, most = f"{len(margins)} example{'s' if len(margins) > 1 else ''}", max(margins.values())
    return [
        f"around {examples} float32 errs within a certified radius, where the network as a function of real "
        f"numbers is right, as the certificate says (in float64, by a margin of up to {most:.2g}): "
        "what torch computes is certified with arithmetic=float32"
    ]


def _ring(certifier: str, radius: Tensor, by: str, distance: Tensor, hits: Points, threat: Threat) -> None:
    how = f"{by} breaks it at distance {distance[0].item():.6g}"
    how = how if distance[0] > 0 else "the model gets it wrong as it is"
    example, claimed = int(hits.numbers[0]), f"{radius[0].item():.6g}"
    raise SoundnessError(
        f"example {example} is certified by {certifier} up to {claimed} in {threat}, but {how} "
        f"({len(hits.x)} such examples): the certificate, or what it assumes of the model, is wrong",
        example,
        hits.x[0].cpu(),
        hits.x_adv[0].cpu(),
    )
