"""Trackers see the numbers of a training and change nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from helpers import TINY

from holdfast import train
from holdfast.experiments.runs.tracking import trackers


class Notebook:
    """A tracker of the user's own."""

    def __init__(self) -> None:
        self.begun: list[tuple[Path, dict[str, Any]]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.ended: list[dict[str, Any]] = []

    def begin(self, folder: Path, settings: dict[str, Any]) -> None:
        self.begun.append((folder, settings))

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def end(self, result: dict[str, Any]) -> None:
        self.ended.append(result)


def test_a_tracker_sees_what_the_run_folder_holds(tmp_path: Path) -> None:
    notebook = Notebook()
    run = train("digits", *TINY, runs=tmp_path, track=[notebook])
    assert notebook.begun == [(run.path, run.experiment.model_dump(mode="json"))]
    assert [step for step, _ in notebook.logged] == list(run.history["step"])
    assert [values["loss"] for _, values in notebook.logged] == pytest.approx(list(run.history["loss"]))
    assert notebook.ended == [run.result]
    train("digits", *TINY, runs=tmp_path, track=[notebook])
    assert len(notebook.begun) == 1  # finished already


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train("digits", *TINY, runs=tmp_path, track=["tensorboard"])
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(run.history["step"])
    assert events.Scalars("test_attacked/pgd")[0].value == pytest.approx(run.result["attacked"]["pgd"])


def test_wandb_gets_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In place of the package, which talks to its servers: what it is asked to do.
    wandb = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run = train("digits", *TINY, runs=tmp_path, track=["wandb"])
    settings = run.experiment.model_dump(mode="json")
    wandb.init.assert_called_once_with(
        project="holdfast", id=run.path.name, resume="allow", dir=str(run.path), config=settings
    )
    logged = wandb.init.return_value
    assert [call.kwargs["step"] for call in logged.log.call_args_list] == list(run.history["step"])
    assert logged.summary.update.call_args.args[0]["attacked"] == run.result["attacked"]
    logged.finish.assert_called_once_with()


def test_unknown_trackers_and_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'tensorbord' is not one of the trackers; did you mean 'tensorboard'"):
        trackers(["tensorbord"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"wandb is not installed .*pip install 'holdfast\[wandb\]'"):
        trackers(["wandb"])
