"""Trackers: where else the numbers of a training go. Any object with these three methods is one."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from holdfast.component import nearest
from holdfast.listeners import Reporter


class Tracker(Protocol):
    """Takes the numbers of one training."""

    def begin(self, folder: Path, settings: dict[str, Any]) -> None:
        """A run starts or goes on: its folder and its resolved recipe."""

    def log(self, values: dict[str, float], step: int) -> None:
        """The numbers of an epoch, after so many batches."""

    def end(self, result: dict[str, Any]) -> None:
        """The run is finished; what ``result.json`` holds."""


class TensorBoard:
    """Writes ``tensorboard/`` in the run folder; needs ``pip install holdfast[tensorboard]``."""

    def __init__(self) -> None:
        self._module = _need("torch.utils.tensorboard", "tensorboard")

    def begin(self, folder: Path, settings: dict[str, Any]) -> None:
        self._writer = self._module.SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("recipe", "".join(f"    {key}: {value}\n" for key, value in settings.items()))

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def end(self, result: dict[str, Any]) -> None:
        self._writer.add_scalar("test_standard", result["standard"])
        for kind in ("attacked", "certified"):
            for name, value in result[kind].items():
                self._writer.add_scalar(f"test_{kind}/{name}", value)
        self._writer.close()


class WandB:
    """A run of the project ``holdfast`` on Weights & Biases; needs ``pip install holdfast[wandb]``."""

    def __init__(self) -> None:
        self._module = _need("wandb", "wandb")

    def begin(self, folder: Path, settings: dict[str, Any]) -> None:
        self._run = self._module.init(
            project="holdfast", id=folder.name, resume="allow", dir=str(folder), config=settings
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def end(self, result: dict[str, Any]) -> None:
        self._run.summary.update({key: result[key] for key in ("standard", "attacked", "certified", "threat")})
        self._run.finish()


TRACKERS: dict[str, type[TensorBoard] | type[WandB]] = {"tensorboard": TensorBoard, "wandb": WandB}


def trackers(names: Sequence[str | Tracker]) -> list[Tracker]:
    """Trackers by name; an object that is one stays what it is.

    Raises:
        ValueError: an unknown name, or a package that is not installed.
    """
    for name in names:
        if isinstance(name, str) and name not in TRACKERS:
            raise ValueError(f"{name!r} is not one of the trackers; {nearest(name, TRACKERS)}")
    return [TRACKERS[name]() if isinstance(name, str) else name for name in names]


def _need(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as fault:
        raise ValueError(f"{extra} is not installed ({fault}); pip install 'holdfast[{extra}]'") from fault


class TrackedReporter(Reporter):
    """A reporter whose epochs go to trackers, too."""

    def __init__(self, reporter: Reporter, trackers: Sequence[Tracker]) -> None:
        self._reporter, self._trackers = reporter, trackers

    def begin(self, folder: Path) -> None:
        self._reporter.begin(folder)

    def train(self, steps: int, per_epoch: int, finished: int) -> None:
        self._reporter.train(steps, per_epoch, finished)

    def step(self, loss: Tensor) -> None:
        self._reporter.step(loss)

    def epoch(self, record: dict[str, Any]) -> None:
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
        values = {key: float(value) for key, value in numbers.items() if key != "step"}
        for tracker in self._trackers:
            tracker.log(values, record["step"])
        self._reporter.epoch(record)

    def stage(self, text: str) -> None:
        self._reporter.stage(text)
