"""Projected ascent of any per-example function over a threat model: the one ascent of holdfast.

PGD maximises cross-entropy, TRADES a divergence, a local Lipschitz estimate a quotient: each is a caller
of ``ascend`` with its own function. Examples are independent: one that is finished leaves the batch and
the next in the queue takes its place, so the verdict on an example does not hang on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.threat import Threat

Function = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""(points (n, ...), rows (n,)) → values to ascend (n,), and which of them are finished (n,) or None.

``rows`` says which of the N examples the points belong to, so that the function can gather their labels."""

Start = Callable[[Tensor, int], Tensor]
"""(rows (n,), restart) → the points (n, ...) to start from."""


@dataclass(frozen=True)
class Ascent:
    """What was found for each of N examples."""

    x: Tensor
    """The finished point, or else the best one (or the last one, where that was asked for); (N, ...)."""
    value: Tensor
    """The function there, (N,)."""
    finished: Tensor
    """Whether the function declared the point finished, (N,) bool."""
    forwards: Tensor
    """Forward passes spent on the example, (N,) int64."""
    backwards: Tensor
    """Backward passes spent on the example, (N,) int64."""


def ascend(
    function: Function,
    x: Tensor,
    threat: Threat,
    *,
    steps: int,
    step_size: float,
    start: Start,
    restarts: int = 1,
    batch_size: int | None = None,
) -> Ascent:
    """Steepest ascent with projection, keeping the best point of each example over all restarts.

    x_{t+1} = project(x_t + step_size · steepest(∇function(x_t))), t = 0 … steps − 1; the function is
    evaluated at all steps + 1 points of a restart. An example is done with its first finished point.

    Args:
        x: the examples, (N, ...), inside the threat's box.
        step_size: length of a step in the threat's norm, in input units.
        batch_size: at most so many examples in a forward pass; all of them by default.

    Raises:
        FloatingPointError: the function is NaN or inf at some point.
    """
    best = x.clone()
    value = x.new_full((len(x),), -torch.inf)
    finished = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    forwards = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    backwards = torch.zeros_like(forwards)

    for restart in range(restarts):
        queue = (~finished).nonzero().squeeze(1)
        capacity = len(queue) if batch_size is None else batch_size
        rows, queue = queue[:capacity], queue[capacity:]
        points = start(rows, restart) if len(rows) else x[:0]
        age = torch.zeros_like(rows)
        while len(rows):
            points.requires_grad_(bool((age < steps).any()))
            with torch.enable_grad():
                values, done = function(points.clone(), rows)  # a clone, for modules that change their input
            # An example that is done may stay in the batch for a while, but nothing more is made of it.
            live = ~finished[rows] & (age <= steps)
            scores = values.detach()
            if not torch.isfinite(scores[live]).all():
                raise FloatingPointError("the function under ascent is NaN or inf")
            done = live & done if done is not None else torch.zeros_like(live)
            forwards[rows] += live

            better = live & (done | (scores > value[rows]))
            best[rows[better]] = points.detach()[better]
            value[rows[better]] = scores[better]
            finished[rows] |= done

            going = live & ~done & (age < steps)
            if going.any():
                gradient = _gradient(values, points)
                backwards[rows] += going
                points = points.detach()
                points = threat.project(x[rows], points + step_size * threat.steepest(gradient, points))
            points, age = points.detach(), age + 1
            stale = len(going) - int(going.sum())
            if stale and (len(queue) or 8 * stale >= len(going)):
                fresh, queue = queue[:stale], queue[stale:]
                rows = torch.cat([rows[going], fresh])
                age = torch.cat([age[going], torch.zeros_like(fresh)])
                points = torch.cat([points[going], start(fresh, restart)]) if len(fresh) else points[going]
    return Ascent(best, value, finished, forwards, backwards)


def _gradient(values: Tensor, points: Tensor) -> Tensor:
    """The gradient of each value for its own point; zero where the function does not look at the point."""
    if not values.requires_grad:
        return torch.zeros_like(points)
    return torch.autograd.grad(values.sum(), points, materialize_grads=True)[0]


def climb(function: Function, x: Tensor, threat: Threat, *, steps: int, step_size: float, start: Tensor) -> Tensor:
    """The last point of one ascent from ``start``: what training methods are defined with; (N, ...).

    ``steps`` forward and backward passes; nothing is kept, compared or synchronised on the way.
    """
    rows = torch.arange(len(x), device=x.device)
    points = start.detach()
    for _ in range(steps):
        points.requires_grad_(True)
        with torch.enable_grad():
            values = function(points.clone(), rows)[0]
        gradient = _gradient(values, points)
        points = points.detach()
        points = threat.project(x, points + step_size * threat.steepest(gradient, points))
    return points
