"""Projected ascent of any per-example function over a threat model: the one ascent of holdfast.

PGD maximises cross-entropy, TRADES a divergence, a local Lipschitz estimate a quotient: each is a caller
of ``ascend`` with its own function. Examples are independent: one that is finished leaves the batch and
the next in the queue takes its place, so the verdict on an example does not hang on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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

    def take(self, rows: Tensor) -> Ascent:
        """Of some of the examples."""
        return Ascent(*(part[rows] for part in vars(self).values()))

    def join(self, other: Ascent) -> Ascent:
        """Of these examples, then of others."""
        return Ascent(*map(torch.cat, zip(vars(self).values(), vars(other).values(), strict=True)))

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
        step = self.threat.steepest(gradient, points, self.share)
        if self.decay is not None:
            step = step * per_example(self.decay(age), points)
        return self.threat.project(x, torch.add(points, step, alpha=self.step_size))


def per_example(values: Tensor, like: Tensor) -> Tensor:
    """Values (N,) shaped to act on tensors (N, ...)."""
    return values.view(-1, *[1] * (like.dim() - 1))


def patience(device: torch.device) -> int:
    """Steps between two questions whether examples are finished: a CPU answers at once, any other device makes the
    host wait."""
    return 1 if device.type == "cpu" else 8


def surely_none(mask: Tensor) -> bool:
    """Whether nothing is set, as far as that can be told without waiting for a device."""
    return mask.device.type == "cpu" and not mask.any()


@dataclass
class _Batch:
    """Examples that ascend together, and what this attempt found for each."""

    rows: Tensor
    x: Tensor
    points: Tensor
    age: Tensor
    state: State
    found: Ascent

    @classmethod
    def begin(cls, rows: Tensor, x: Tensor, points: Tensor, rule: StepRule) -> _Batch:
        """These of the examples, at these points."""
        own = x[rows]
        return cls(rows, own, points, torch.zeros_like(rows), rule.begin(own, points), Ascent.before(own))

    def take(self, kept: Tensor) -> _Batch:
        """Some of them."""
        state, found = {name: part[kept] for name, part in self.state.items()}, self.found.take(kept)
        return _Batch(self.rows[kept], self.x[kept], self.points[kept], self.age[kept], state, found)

    def join(self, other: _Batch) -> _Batch:
        """They, then others."""
        return _Batch(
            torch.cat([self.rows, other.rows]),
            torch.cat([self.x, other.x]),
            torch.cat([self.points, other.points]),
            torch.cat([self.age, other.age]),
            {name: torch.cat([part, other.state[name]]) for name, part in self.state.items()},
            self.found.join(other.found),
        )

    def live(self, steps: int) -> Tensor:
        """Which of them count. One that is done may stay for a while, but nothing more is made of it."""
        return ~self.found.finished & (self.age <= steps)

    def step(self, function: Function, rule: StepRule, steps: int, *, climbing: bool) -> Tensor:
        """One evaluation, and a move where one is left; whether some value was NaN or inf, a scalar on the device.

        Args:
            climbing: some may have a step left.
        """
        leaf, found, live = self.points.detach().requires_grad_(climbing), self.found, self.live(steps)
        with torch.enable_grad():
            values, done = function(leaf, self.rows)
        points, scores = leaf.detach(), values.detach().to(found.value.dtype)
        done = live & done if done is not None else torch.zeros_like(live)
        better = live & (done | (scores > found.value))
        going = live & ~done & (self.age < steps)
        odd = torch.zeros_like(going)
        if climbing and not surely_none(going):
            gradient, odd = slopes_of(values, leaf)
            self.points = rule.move(self.state, self.x, points, scores, gradient, self.age).detach()
        self.found = replace(
            found,
            x=torch.where(per_example(better, points), points, found.x),
            value=torch.where(better, scores, found.value),
            step=torch.where(better, self.age, found.step),
            finished=found.finished | done,
            forwards=found.forwards + live,
            backwards=found.backwards + going,
            odd=found.odd | (going & odd),
        )
        self.age = self.age + 1
        return (live & ~torch.isfinite(scores)).any()


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
    result, every = Ascent.before(x), patience(x.device)

    def begun(rows: Tensor, restart: int) -> _Batch:
        return _Batch.begin(rows, x, start(rows, restart) if len(rows) else x[:0], rule)

    for restart in range(restarts):
        queue = result.unfinished
        room = len(queue) if batch_size is None else batch_size
        batch, queue, youngest, faults = begun(queue[:room], restart), queue[room:], 0, list[Tensor]()
        while len(batch.rows):
            faults.append(batch.step(function, rule, steps, climbing=youngest < steps))
            youngest += 1
            if youngest <= steps and youngest % every:
                continue
            if torch.stack(faults).any():
                raise FloatingPointError("the function under ascent is NaN or inf")
            faults.clear()
            going = batch.live(steps)
            stale = len(going) - int(going.sum())
            if stale and (len(queue) or 8 * stale >= len(going)):
                result.absorb(batch.rows[~going], batch.found.take(~going), restart)
                batch = batch.take(going)
                if len(queue):
                    batch, queue, youngest = batch.join(begun(queue[:stale], restart)), queue[stale:], 0
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
    if surely_none(odd):
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
        points = threat.project(x, torch.add(points, threat.steepest(gradient, points), alpha=step_size))
    return points
