"""Projected ascent of any per-example function over a threat model: the one ascent of holdfast.

PGD maximises cross-entropy, TRADES a divergence, a local Lipschitz estimate a quotient: each is a caller
of ``ascend`` with its own function. Examples are independent: one that is finished leaves the batch and
the next in the queue takes its place, so the verdict on an example does not hang on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from holdfast.threat import Threat

Function = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""(points (n, ...), rows (n,)) → values to ascend (n,), and which of them are finished (n,) or None.

``rows`` says which of the N examples the points belong to, so that the function can gather their labels. The points
are not to be changed: a model whose forward works in place is asked inside ``inference.own_inputs``."""

Start = Callable[[Tensor, int], Tensor]
"""(rows (n,), restart) → the points (n, ...) to start from."""


Decay = Callable[[Tensor], Tensor]
"""Steps made so far, (n,) → what is left of the length of the first, (n,)."""

State = dict[str, Tensor]
"""What a step rule remembers of each example, (n, ...) each."""


@dataclass(frozen=True)
class Ascent:
    """What was found for each of N examples."""

    x: Tensor
    """The finished point, or else the best one; (N, ...)."""
    value: Tensor
    """The function there, (N,)."""
    finished: Tensor
    """Whether the function declared the point finished, (N,) bool."""
    forwards: Tensor
    """Forward passes spent on the example, (N,) int64."""
    backwards: Tensor
    """Backward passes spent on the example, (N,) int64."""
    restart: Tensor
    """The attempt in which the point was found, (N,) int64 from 0."""
    step: Tensor
    """The step of that attempt, (N,) int64; 0 is its start."""
    odd: Tensor
    """Whether some gradient on its way was NaN or inf and had to be ``tamed``, (N,) bool."""

    @classmethod
    def before(cls, x: Tensor) -> Ascent:
        """Nothing tried yet: the points are the examples themselves."""
        zeros = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        value = torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
        forwards, backwards, restart, step = (zeros.clone() for _ in range(4))
        return cls(x.clone(), value, zeros.bool(), forwards, backwards, restart, step, zeros.bool())

    @property
    def unfinished(self) -> Tensor:
        """Their numbers."""
        return (~self.finished).nonzero().squeeze(1)

    def absorb(self, rows: Tensor, other: Ascent, restart: int | None = None, *, keep_better: bool = True) -> None:
        """Take over what one more attempt found for some unfinished examples, in place.

        Args:
            restart: number of the attempt; its own numbers by default.
            keep_better: let a point of higher value replace one that is not finished either.
        """
        better = other.finished | (keep_better & (other.value > self.value[rows]))
        chosen = rows[better]
        self.x[chosen], self.value[chosen] = other.x[better], other.value[better]
        self.restart[chosen] = other.restart[better] if restart is None else restart
        self.step[chosen] = other.step[better]
        self.finished[rows] |= other.finished
        self.forwards[rows] += other.forwards
        self.backwards[rows] += other.backwards
        self.odd[rows] |= other.odd


class StepRule(Protocol):
    """How an ascent moves."""

    def begin(self, x: Tensor, points: Tensor) -> State:
        """What is remembered of examples that start at these points."""

    def move(self, state: State, x: Tensor, points: Tensor, value: Tensor, gradient: Tensor, age: Tensor) -> Tensor:
        """The next points (n, ...); changes the state in place.

        Args:
            x: the examples themselves.
            value: the function at the points, (n,).
            age: steps made so far, (n,).
        """


@dataclass(frozen=True)
class Steepest:
    """x_{t+1} = project(x_t + step_size · steepest(m_t, share)), with m_t = momentum · m_{t−1} + g_t / mean |g_t|.

    Without momentum m_t is the gradient itself; with it, that of MI-FGSM (Dong et al., 2018).
    """

    threat: Threat
    step_size: float
    momentum: float = 0.0
    share: float = 0.0
    decay: Decay | None = None
    """Of the step size; constant by default."""

    def begin(self, x: Tensor, points: Tensor) -> State:
        return {"velocity": torch.zeros_like(points)} if self.momentum else {}

    def move(self, state: State, x: Tensor, points: Tensor, value: Tensor, gradient: Tensor, age: Tensor) -> Tensor:
        if self.momentum:
            size = gradient.flatten(1).abs().mean(1).clamp(min=torch.finfo(gradient.dtype).tiny)
            gradient = self.momentum * state["velocity"] + gradient / per_example(size, gradient)
            state["velocity"] = gradient
        length = self.step_size if self.decay is None else per_example(self.step_size * self.decay(age), points)
        return self.threat.project(x, points + length * self.threat.steepest(gradient, points, self.share))


def per_example(values: Tensor, like: Tensor) -> Tensor:
    """Values (N,) shaped to act on tensors (N, ...)."""
    return values.view(-1, *[1] * (like.dim() - 1))


def ascend(
    function: Function,
    x: Tensor,
    rule: StepRule,
    *,
    steps: int,
    start: Start,
    restarts: int = 1,
    batch_size: int | None = None,
) -> Ascent:
    """Ascent by a step rule, keeping the best point of each example over all restarts.

    The function is evaluated at all steps + 1 points of a restart. An example is done with its first
    finished point. A gradient that is NaN or inf is ``tamed`` and noted; it stops no other example.

    Args:
        x: the examples, (N, ...), inside the threat's box.
        rule: ``Steepest`` for PGD; it stays within the threat set.
        batch_size: at most so many examples in a forward pass; all of them by default.

    Raises:
        FloatingPointError: the function is NaN or inf at some point.
    """
    result = Ascent.before(x)
    best, value, finished = result.x, result.value, result.finished
    for restart in range(restarts):
        queue = result.unfinished
        capacity = len(queue) if batch_size is None else batch_size
        rows, queue = queue[:capacity], queue[capacity:]
        points = start(rows, restart) if len(rows) else x[:0]
        state = rule.begin(x[rows], points)
        age = torch.zeros_like(rows)
        while len(rows):
            points.requires_grad_(bool((age < steps).any()))
            with torch.enable_grad():
                values, done = function(points, rows)
            # An example that is done may stay in the batch for a while, but nothing more is made of it.
            live = ~finished[rows] & (age <= steps)
            scores = values.detach().to(value.dtype)
            if not torch.isfinite(scores[live]).all():
                raise FloatingPointError("the function under ascent is NaN or inf")
            done = live & done if done is not None else torch.zeros_like(live)
            result.forwards[rows] += live

            better = live & (done | (scores > value[rows]))
            chosen = rows[better]
            best[chosen], value[chosen] = points.detach()[better], scores[better]
            result.restart[chosen], result.step[chosen] = restart, age[better]
            finished[rows] |= done

            going = live & ~done & (age < steps)
            if going.any():
                gradient, odd = slopes_of(values, points)
                result.odd[rows] |= going & odd
                result.backwards[rows] += going
                points = rule.move(state, x[rows], points.detach(), scores, gradient, age)
            points, age = points.detach(), age + 1
            stale = len(going) - int(going.sum())
            if stale and (len(queue) or 8 * stale >= len(going)):
                fresh, queue = queue[:stale], queue[stale:]
                rows, age = torch.cat([rows[going], fresh]), torch.cat([age[going], torch.zeros_like(fresh)])
                points, state = points[going], {name: part[going] for name, part in state.items()}
                if len(fresh):
                    begun = start(fresh, restart)
                    new = rule.begin(x[fresh], begun)
                    points = torch.cat([points, begun])
                    state = {name: torch.cat([part, new[name]]) for name, part in state.items()}
    return result


def gradient_of(values: Tensor, points: Tensor, *, keep: bool = False) -> Tensor:
    """The gradient of each value for its own point, ``tamed``; zero where the function does not look at the point.

    Args:
        keep: the graph is needed again.
    """
    return slopes_of(values, points, keep=keep)[0]


def slopes_of(values: Tensor, points: Tensor, *, keep: bool = False) -> tuple[Tensor, Tensor]:
    """``gradient_of``, and of which examples it was NaN or inf somewhere, (n,) bool."""
    if not values.requires_grad:
        return torch.zeros_like(points), torch.zeros_like(values, dtype=torch.bool)
    with torch.enable_grad():  # for a caller without, too
        total = values.sum()
    return tamed(torch.autograd.grad(total, points, retain_graph=keep, materialize_grads=True)[0])


def tamed(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """A gradient (n, ...) without NaN and inf, and of which examples it had some, (n,) bool.

    NaN becomes 0; ±inf becomes as large as the largest finite entry of its example, 1 without such: so a root at
    0 or a pixel without spread points the way it does without outweighing all others for good.
    """
    flat = gradient.flatten(1)
    odd = ~torch.isfinite(flat.sum(1))
    if gradient.device.type == "cpu" and not odd.any():  # elsewhere to ask would be to wait
        return gradient, odd
    finite = flat.nan_to_num(0.0, 0.0, 0.0)
    largest = finite.abs().amax(1, keepdim=True) if flat.shape[1] else finite
    infinite = flat.isinf() * flat.nan_to_num(0.0).sign()
    return (finite + infinite * torch.where(largest > 0, largest, 1)).view_as(gradient), odd


def climb(function: Function, x: Tensor, threat: Threat, *, steps: int, step_size: float, start: Tensor) -> Tensor:
    """The last point of one ascent from ``start``: what training methods are defined with; (N, ...).

    ``steps`` forward and backward passes; nothing is kept, compared or synchronised on the way.
    """
    rows = torch.arange(len(x), device=x.device)
    points = start.detach()
    for _ in range(steps):
        points.requires_grad_(True)
        with torch.enable_grad():
            values = function(points, rows)[0]
        gradient = gradient_of(values, points)
        points = points.detach()
        points = threat.project(x, points + step_size * threat.steepest(gradient, points))
    return points
