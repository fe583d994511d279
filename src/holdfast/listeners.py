"""Who listens to a training: what is told to them, and when. Without torch, for whoever only shows it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from holdfast.objectives import Progress


class Reporter:
    """Told how a training gets on. This one keeps quiet."""

    def begin(self, folder: Path) -> None:
        """A run starts (or goes on) and keeps its state in this folder."""

    def train(self, steps: int, per_epoch: int, finished: int) -> None:
        """Training starts: so many steps, so many of them an epoch, of which some are finished already."""

    def step(self, loss: Tensor) -> None:
        """A step was made."""

    def epoch(self, record: dict[str, Any]) -> None:
        """An epoch was finished; the record is its line in the history."""

    def stage(self, text: str) -> None:
        """Something else begins or was found."""

    def work(self, text: str, done: int, total: int) -> None:
        """So much of some other work is done."""


class Observer:
    """Sees what is trained on, such as a meter of neural collapse. This one looks away.

    Where several processes train, each has its own, which sees its share of every batch.
    """

    def begin(self, epoch: int, seen: Sequence[dict[str, Any]]) -> None:
        """An epoch begins, from 1 on, after what these ``state`` gave of it: none, one before a training was cut
        off, or at the end those of all processes."""

    def observe(self, x: Tensor, y: Tensor, x_adv: Tensor | None, progress: Progress) -> None:
        """The clean inputs, their labels, what the objective perturbed them to, and when; after the step."""

    def record(self) -> dict[str, Any]:
        """What goes into the epoch's line of the history, numbers and lists."""
        return {}

    def state(self) -> dict[str, Any]:
        """What it has seen of the epoch under way, for a checkpoint: tensors, numbers and lists of them."""
        return {}
