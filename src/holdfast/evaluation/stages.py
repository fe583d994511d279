"""The stages of an evaluation, certifiers and attacks: each asked about some of its examples at a time.

What a stage has found is kept with the numbers of the examples, so that an evaluation that was cut off, or whose
time was up, goes on with those that are missing.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from holdfast.attacks import AttackResult
from holdfast.certify import Certificate

Finding = TypeVar("Finding", AttackResult, Certificate)
Rows = Tensor
"""Numbers of examples of the evaluation, (M,) int64 on the CPU."""


Keep = Callable[[Tensor, Any], None]
"""(the places of examples among those that were asked about, (M,), what is found of them)."""


class Store(Protocol):
    """Keeps what the stages of an evaluation found, so that it need not be found again."""

    def kept(self, stage: str) -> list[tuple[Rows, Any]]:
        """The pieces of a stage, ``AttackResult`` or ``Certificate`` each, as they were put."""

    def put(self, stage: str, rows: Rows, found: Any) -> None:
        """Keep a piece. The stage tells what was asked of whom: component, examples, model, threat and seed."""


def joined(parts: Sequence[Finding]) -> Finding:
    """One finding of several, in order."""

    def join(values: list[Any]) -> Any:
        first = values[0]
        if isinstance(first, Tensor):
            return torch.cat([value.to(first.device) for value in values])
        if isinstance(first, np.ndarray):
            return np.concatenate(values)
        return [entry for value in values for entry in value] if isinstance(first, list) else first

    return replace(parts[0], **{f.name: join([getattr(part, f.name) for part in parts]) for f in fields(parts[0])})


def taken(found: Finding, places: Tensor) -> Finding:
    """A finding of some of its examples, by their places in it."""

    def take(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[places.to(value.device)]
        if isinstance(value, np.ndarray):
            return value[places.numpy()]
        return [value[place] for place in places.tolist()] if isinstance(value, list) else value

    return replace(found, **{f.name: take(getattr(found, f.name)) for f in fields(found)})


class _TimeUp(Exception):
    """Ends what a stage was asked."""


@dataclass
class Stage(Generic[Finding]):
    """A certifier or an attack, and what it has found so far."""

    name: str
    ask: Callable[[Rows, Keep], Finding]
    """What it finds of some examples; what is given to ``keep`` on the way is not lost if it does not come to an
    end."""
    store: Store | None = None
    key: str = ""
    """By which the store knows it."""
    parts: list[tuple[Rows, Finding]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.store is not None:
            self.parts += self.store.kept(self.key)

    @property
    def known(self) -> Rows:
        return torch.cat([rows for rows, _ in self.parts]) if self.parts else torch.zeros(0, dtype=torch.int64)

    def missing(self, rows: Rows) -> Rows:
        """Those that it was not asked about yet."""
        return rows[~torch.isin(rows, self.known)]

    def about(self, rows: Rows, clock: Clock | None = None) -> tuple[Rows, Finding | None]:
        """What it finds of these, asked now where it is not known, and of which; None of none.

        Args:
            clock: once it is up, what is not finished is left out.
        """
        if len(new := self.missing(rows)):

            def keep(places: Tensor, found: Finding) -> None:
                self._keep(new[places], found)
                if clock is not None and clock.up:
                    raise _TimeUp

            with contextlib.suppress(_TimeUp):
                found = self.ask(new, keep)
                if len(self.missing(new)):
                    self._keep(new, found)
        return self.found(rows)

    def _keep(self, rows: Rows, found: Finding) -> None:
        self.parts.append((rows, found))
        if self.store is not None:
            self.store.put(self.key, rows, found)

    def found(self, rows: Rows) -> tuple[Rows, Finding | None]:
        """Of which of these it knows something, and that."""
        order, where = self.known.sort()
        places = torch.searchsorted(order, rows).clamp(max=max(0, len(order) - 1))
        there = order[places] == rows if len(order) else torch.zeros_like(rows, dtype=torch.bool)
        if not there.any():
            return rows[:0], None
        return rows[there], taken(joined([found for _, found in self.parts]), where[places[there]])


def certificate_of(stage: Stage[Certificate], prediction: Tensor, y: Tensor, guarantee: str) -> Certificate:
    """What a certifier found of all N examples; of those that it was not asked about, that it is undecided.

    Args:
        prediction: of those, (N,).
    """
    rows, found = stage.found(torch.arange(len(y)))
    if found is not None and len(rows) == len(y):
        return found
    right = (prediction == y).tolist()
    nothing = Certificate(
        prediction,
        torch.zeros_like(y, dtype=torch.bool),
        torch.zeros_like(y, dtype=torch.float64),
        ["undecided" if one else "wrong" for one in right],
        guarantee,
    )
    if found is None:
        return nothing
    fill: dict[str, Any] = {"prediction": nothing.prediction, "status": nothing.status, "method": [""] * len(y)}
    fill |= {
        "unproven": math.ulp(0.0),
        "above": math.inf,
        "margin": -math.inf,
        "abstained": True,
        "counterexample": math.nan,
    }

    def spread(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            start = fill.get(name, 0)
            whole = value.new_empty(len(y), *value.shape[1:])
            whole[:] = start
            whole[rows.to(value.device)] = value
            return whole
        if isinstance(value, list):
            entries = list(fill[name])
            for row, entry in zip(rows.tolist(), value, strict=True):
                entries[row] = entry
            return entries
        return value

    return replace(found, **{f.name: spread(f.name, getattr(found, f.name)) for f in fields(found)})


@dataclass(frozen=True)
class Clock:
    """What is left of the time that an evaluation was given."""

    start: float
    end: float

    @classmethod
    def of(cls, minutes: float) -> Clock:
        now = time.monotonic()
        return cls(now, now + 60 * minutes)

    @property
    def up(self) -> bool:
        return time.monotonic() >= self.end

    def part(self, share: float) -> Clock:
        """A share of what is left."""
        now = time.monotonic()
        return Clock(now, now + share * (self.end - now))

    @property
    def spent(self) -> float:
        """The share that is over."""
        return (time.monotonic() - self.start) / max(self.end - self.start, 1e-9)


def spend(steps: Sequence[Callable[[Rows], int | None]], count: int, size: int, clock: Clock) -> None:
    """Take blocks of examples through the steps, each block in their order, always by the step that has decided
    most examples for its time so far, until there is none left or the time is up.

    Of n steps the k-th is first tried when those before it have no more blocks, or (k − 1) / n of the time is over.

    Args:
        steps: each is asked about a block, and tells how many examples it newly decided; None where nothing was
            left to ask.
        count: of all examples.
        size: of a block.
    """
    blocks = torch.arange(count).split(size)
    place = [0] * len(blocks)
    decided, seconds = [0] * len(steps), [0.0] * len(steps)

    def worth(step: int) -> float:
        if seconds[step]:
            return decided[step] / seconds[step]
        return math.inf if clock.spent > step / len(steps) else 0.0

    while not clock.up and (ahead := sorted({step for step in place if step < len(steps)})):
        step = max(ahead, key=worth)
        block = place.index(step)
        started = time.monotonic()
        if (gain := steps[step](blocks[block])) is not None:
            decided[step] += gain
            seconds[step] += time.monotonic() - started
        place[block] += 1
