"""The audit: certified examples attacked where a false certificate would show, the closest first.

The least margin is sought at eps and at the certified radius: first at the worst corner of a linear function, by
the gradient at x and again at that corner, then by projected descent from there. What is found is held against
every certificate by ``Watch``. Cheap beside an evaluation, or hard over all that is certified.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from holdfast.attacks.attack import Targets
from holdfast.attacks.losses import gap, targeted_gap
from holdfast.attacks.pgd import likeliest
from holdfast.evaluation.alarm import Claim, Points, Watch
from holdfast.inference import frozen_eval, plain_arithmetic, predict
from holdfast.search import gradient_of, per_example
from holdfast.threat import Threat

FEWEST = 8
"""Examples of each certifier that are audited at least."""


@dataclass(frozen=True)
class Effort:
    """How hard an audit looks, for each example and radius."""

    corners: int = 3
    """Steps to the worst corner of the linear function that the gradient is."""
    steps: int = 10
    """Steps of projected descent from there, 2.5 / steps of the radius each; in l_0 corners as well."""
    restarts: int = 1
    """Starts: the example itself, then random points of the ball."""
    targets: int | None = 1
    """The so many likeliest other classes; None for all."""

    def passes(self, classes: int) -> int:
        """Forward and backward passes that an example takes at one radius, those of the verdict among them."""
        targets = min(self.targets or classes, classes - 1)
        return targets * self.restarts * (2 * (self.corners + self.steps) + 1) + 3


CHEAP = Effort()


@dataclass(frozen=True)
class Audit:
    """What an audit found, where it did not ring."""

    examples: int
    """Certified examples that were attacked."""
    passes: int
    """Forward and backward passes."""
    smallest_margin: float | None
    """The least margin seen within a certificate, in float64."""
    example: int | None
    """That of which it is."""


def audit(
    watch: Watch,
    claims: Sequence[Claim],
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    effort: Effort = CHEAP,
    *,
    seed: int = 0,
    batch_size: int = 256,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Audit:
    """Attack certified examples and hold what is found against the claims about them.

    Args:
        claims: about all N examples.
        x, y: all of them, (N, ...) and (N,).
        rows: those that are audited, (M,) on the CPU.
        tell: told how many points are sought out, of how many.

    Raises:
        SoundnessError: a point contradicts a certificate.
    """
    radii = radii_of(claims, watch.threat, x)[rows]
    asked = radii.isfinite().nonzero()
    numbers, eps = rows[asked[:, 0]], radii[asked[:, 0], asked[:, 1]]
    least, passes = torch.full_like(eps, torch.inf), 0
    for jobs in torch.arange(len(eps)).split(batch_size) if len(eps) else ():
        here = numbers[jobs].to(x.device)
        with frozen_eval(watch.classifier), plain_arithmetic(x.device):
            targets = Targets(x[here], y[here], predict(watch.classifier, x[here]), here, seed, batch_size)
            found = lowest(watch.classifier, targets, watch.threat, eps[jobs].to(x), effort)
        passes += len(jobs) * effort.passes(targets.logits.shape[1])
        points = Points(x[here], y[here], found, numbers[jobs])
        least[jobs] = watch.check("the audit", [claim.take(numbers[jobs]) for claim in claims], points)
        tell(int(jobs[-1]) + 1, len(eps))
    if not least.isfinite().any():
        return Audit(len(rows), passes, None, None)
    return Audit(len(rows), passes, least.min().item(), int(numbers[least.argmin()]))


def radii_of(claims: Sequence[Claim], threat: Threat, x: Tensor) -> Tensor:
    """At which radii each example is audited: eps, and the largest that is certified, or that which covers the box;
    (N, 2) float64, NaN where it is not certified at eps, or no farther, or the box has no end."""
    most = torch.stack([claim.radius.cpu().double() for claim in claims]).amax(0)
    most = most.clamp(max=max(threat.eps, threat.covering_eps(x[0].numel())))
    at_eps = torch.full_like(most, threat.eps).masked_fill((most < threat.eps) | (threat.eps == 0), torch.nan)
    return torch.stack([at_eps, most.masked_fill((most <= threat.eps) | most.isinf(), torch.nan)], 1)


def closest_first(claims: Sequence[Claim], margins: Mapping[str, Tensor], eps: float) -> Tensor:
    """The examples that are certified at eps, those first that some certifier certifies by the smallest margin, or
    by the smallest radius where it tells no margins; (M,)."""
    rank = torch.full((len(claims[0].radius),), torch.inf, dtype=torch.float64)
    for claim in claims:
        radius = claim.radius.cpu()
        holds = (radius >= eps).nonzero().squeeze(1)
        measure = margins.get(claim.name, radius).cpu()[holds]
        place = torch.empty(len(holds), dtype=torch.float64)
        place[measure.argsort(stable=True)] = torch.arange(len(holds), dtype=torch.float64)
        rank[holds] = torch.minimum(rank[holds], place)
    return rank.argsort(stable=True)[: int(rank.isfinite().sum())]


def affordable(rows: Tensor, radii: Tensor, passes: float, each: int, least: int) -> Tensor:
    """The first of the rows that so many passes allow, but at least so many.

    Args:
        radii: of all examples, (N, 2), NaN where none is asked.
        each: passes for an example and a radius.
    """
    cost = (radii[rows].isfinite().sum(1) * each).cumsum(0)
    return rows[: max(int((cost <= passes).sum()), least)]


def lowest(model: nn.Module, targets: Targets, threat: Threat, radius: Tensor, effort: Effort) -> Tensor:
    """Points within a radius for each example (N,) where its margin is the smallest that was found, (N, ...)."""
    best, least = targets.x.clone(), torch.full_like(radius, torch.inf)
    for number, other in enumerate(likeliest(targets, effort.targets)):
        for restart in range(effort.restarts):
            points = _start(targets, threat, radius, restart, number)
            for step in range(effort.corners + effort.steps + 1):
                points.requires_grad_(True)
                with torch.enable_grad():
                    logits = model(points)
                    lead = targeted_gap(logits, targets.y, other)
                margin = -gap(logits.detach(), targets.y)
                better = margin < least
                best[better], least[better] = points.detach()[better], margin[better]
                if step < effort.corners + effort.steps:
                    gradient, points = gradient_of(lead, points), points.detach()
                    to_corner = step < effort.corners or threat.discrete
                    points = (
                        _corner(targets.x, gradient, threat, radius)
                        if to_corner
                        else _descended(targets.x, points, gradient, threat, radius, min(1.0, 2.5 / effort.steps))
                    )
    return best


def _start(targets: Targets, threat: Threat, radius: Tensor, restart: int, target: int) -> Tensor:
    """The examples themselves, and afterwards random points of their balls."""
    x = targets.x
    if restart == 0 or threat.discrete:
        return x.clone()
    ball = Threat(threat.norm, 1.0, -math.inf, math.inf)
    noise = ball.random_point(torch.zeros_like(x), targets.draws(5, restart, target))
    return threat.project(x, x + per_example(radius, x) * noise, radius)


def _corner(x: Tensor, gradient: Tensor, threat: Threat, radius: Tensor) -> Tensor:
    """Where the linear function with this gradient is largest within the ball and the box."""
    step = threat.shortest_step(x, gradient, threat.support(x, gradient, radius))
    return threat.project(x, x + step, radius)


def _descended(x: Tensor, points: Tensor, gradient: Tensor, threat: Threat, radius: Tensor, share: float) -> Tensor:
    step = per_example(share * radius, x) * threat.steepest(gradient, points)
    return threat.project(x, points + step, radius)
