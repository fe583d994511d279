"""Sweeps: a plan of runs, and carrying it out so that nothing is lost or done twice."""

from __future__ import annotations

import itertools
import json
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch

from holdfast.certify import SoundnessError
from holdfast.experiments.recipes.experiment import Experiment
from holdfast.experiments.recipes.overrides import apply_all, put, read_recipe
from holdfast.experiments.records.record import EVALUATIONS, RECIPE
from holdfast.experiments.runs.folder import Run
from holdfast.experiments.runs.training import train
from holdfast.experiments.sweeps.axes import Axis, Drawn, Listed, in_words
from holdfast.experiments.sweeps.launchers import Here, Launcher, Stopped
from holdfast.files import is_claimed
from holdfast.listeners import Reporter
from holdfast.training.checkpoint import DamagedCheckpoint

TRIES = 3
"""How often a run is tried whose worker dies."""


@dataclass(frozen=True)
class Planned:
    """One run of a plan."""

    settings: dict[str, Any]
    """What it changes, by dotted keys."""
    labels: dict[str, str]
    """The same in words, for what differs between the runs."""
    experiment: Experiment

    @property
    def training(self) -> str:
        """The name of its training, which several runs may share."""
        return self.experiment.identity

    @property
    def identity(self) -> str:
        """Of the evaluation, below the name of its training."""
        return f"{self.training}/{self.experiment.evaluation_identity(self.training)}"

    @property
    def folder(self) -> str:
        """Of the evaluation, below that of the runs."""
        return self.identity.replace("/", f"/{EVALUATIONS}/")


def plan(
    recipe: str | Path | Mapping[str, Any],
    axes: Sequence[Axis],
    *,
    trials: int = 0,
    seeds: int = 1,
    finish: Callable[[dict[str, Any]], None] | None = None,
) -> list[Planned]:
    """Every combination of listed values, each with every trial's draws and with every seed; equal ones once.

    Args:
        recipe: its name or path, or a plain mapping.
        axes: applied in this order.
        trials: draws of the random keys.
        seeds: seeds, counted from the recipe's.
        finish: changes each combination at last.

    Raises:
        ValueError: a combination that is no experiment; random keys without trials, or the reverse.
    """
    base = dict(recipe) if isinstance(recipe, Mapping) else read_recipe(recipe)
    drawn = [axis for axis in axes if isinstance(axis, Drawn)]
    if drawn and not trials:
        raise ValueError(f"{drawn[0].key} is random: say how often to draw, --trials 16")
    if trials and not drawn:
        raise ValueError("nothing is random: trials need a key=uniform(..) or key=loguniform(..)")
    if seeds < 1:
        raise ValueError(f"expected at least one seed, given {seeds}")
    listed = [axis for axis in axes if isinstance(axis, Listed)]
    worded = {axis.name for axis in listed if axis.words}
    found: dict[tuple[str, ...], Planned] = {}
    choices = itertools.product(*(range(len(axis.choices)) for axis in listed))
    for choice, trial in itertools.product(choices, range(trials or 1)):
        settings = deepcopy(base)
        changes: dict[str, Any] = {}
        labels: dict[str, str] = {}
        places = iter(choice)
        for axis in axes:
            if isinstance(axis, Listed):
                place = next(places)
                new = axis.choices[place]
                if axis.words:
                    labels[axis.name] = axis.words[place]
                elif len(axis.choices) > 1:
                    labels |= {key: in_words(value) for key, value in new.items()}
            elif isinstance(axis, Drawn):
                new = {axis.key: axis.draw(trial)}
                labels[axis.key] = in_words(new[axis.key])
            else:
                new = {axis.key: axis.value(settings)}
            for key, value in new.items():
                put(settings, key, deepcopy(value))
            changes |= new
        if finish:
            finish(settings)
        first = apply_all(deepcopy(settings), ())
        for seed in range(first.seed, first.seed + seeds):
            experiment = first if seed == first.seed else first.model_copy(update={"seed": seed})
            own = labels | ({"seed": str(seed)} if seeds > 1 else {})
            words = [own[name] for name in worded if name in own]
            planned = Planned(changes | {"seed": seed}, own, experiment)
            found.setdefault((planned.identity, *words), planned)
    return list(found.values())


def damaged(planned: Planned, runs: Path) -> Path | None:
    """The folder, of a training or of an evaluation, that is there and cannot be read."""
    run = Run(runs / planned.training)
    evaluation = run.evaluation(planned.experiment)
    if run.path.exists() and not run.path.is_dir():
        return run.path
    try:
        if (run.path / RECIPE).exists() and Run(run.path).trained_as != run.path.name:
            return run.path
    except (OSError, ValueError, TypeError):
        return run.path
    try:
        return evaluation.path if evaluation.finished and not evaluation.result else None
    except (OSError, ValueError, TypeError):
        return evaluation.path


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    planned: Planned
    status: Literal["finished", "failed", "alarm"]
    text: str
    """Accuracies, or the last lines of what went wrong."""
    seconds: float = 0.0


class Watcher:
    """Told how a sweep gets on. This one keeps quiet."""

    def begin(self, plan: Sequence[Planned], left: Sequence[Planned]) -> None:
        """The plan, and what of it is not finished yet."""

    def look(self, underway: Mapping[str, dict[str, Any]]) -> None:
        """What the runs under way last said, by identity: ``text``, ``done``, ``total``."""

    def end(self, outcome: Outcome) -> None:
        """A run ended."""

    def say(self, text: str) -> None:
        """Something else."""


def sweep(
    plan: Sequence[Planned], launcher: Launcher, *, runs: Path, watcher: Watcher | None = None
) -> list[Outcome]:
    """Carry out what is not finished; the outcomes of all runs, in the plan's order.

    A run that was cut off goes on; one whose folder is damaged is put aside and begun anew; one whose worker dies
    is tried again; one that fails stops no other.
    """
    watcher = watcher or Watcher()
    outcomes: dict[str, Outcome] = {}
    for one in plan:
        while path := damaged(one, runs):
            watcher.say(f"{path} is damaged: kept as {_put_aside(path, runs)}, begun anew")
        run = Run(runs / one.folder)
        if run.finished and run.trained:
            outcomes[one.identity] = Outcome(one, "finished", accuracies(run.result))
    watcher.begin(plan, [one for one in plan if one.identity not in outcomes])
    tries: dict[str, int] = {}
    elsewhere: dict[str, Planned] = {}
    pending: dict[Future[Any], Planned] = {}

    def submit(these: Sequence[Planned]) -> None:
        jobs = [(one.experiment.model_dump(mode="json"), str(runs)) for one in these]
        pending.update(zip(launcher.submit(work, jobs), these, strict=True))

    try:
        submit([one for identity, one in {one.identity: one for one in plan}.items() if identity not in outcomes])
        while pending or elsewhere:
            done = wait(pending, timeout=0.3, return_when=FIRST_COMPLETED).done if pending else set()
            for one in [one for one in elsewhere.values() if _is_free(one, runs)]:
                submit([elsewhere.pop(one.identity)])  # it goes on, or finds the run finished
            time.sleep(0 if pending else 1)
            watcher.look(_said(runs, list(pending.values())))
            for future in done:
                one = pending.pop(future)
                fault = future.exception()
                if fault is not None:  # the work itself raises nothing
                    tries[one.identity] = tries.get(one.identity, 1) + 1
                    if tries[one.identity] <= TRIES:
                        watcher.say(f"{one.identity}: {fault}; tried again")
                        submit([one])
                        continue
                    outcome = Outcome(one, "failed", f"{fault}, {TRIES} times")
                elif future.result()["status"] == "elsewhere":
                    elsewhere[one.identity] = one
                    watcher.say(f"{one.identity} is worked on by another process: waits for it")
                    continue
                else:
                    outcome = replace(Outcome(one, "failed", ""), **future.result())
                outcomes[one.identity] = outcome
                watcher.end(outcome)
    except BaseException:
        launcher.stop(now=True)
        raise
    launcher.stop(now=False)
    return [replace(outcomes[one.identity], planned=one) for one in plan]


def _is_free(one: Planned, runs: Path) -> bool:
    return not any(is_claimed(runs / name) for name in (one.training, one.folder))


def work(job: tuple[dict[str, Any], str]) -> dict[str, Any]:
    """One run, in whatever process: how it ended. Raises nothing, so that whatever is raised killed the worker."""
    settings, runs = job
    started = time.perf_counter()
    status, text = "failed", ""
    try:
        experiment = Experiment.model_validate(settings)
        with _Notes(Path(runs) / experiment.identity) as notes:
            try:
                run = train(experiment, runs=runs, reporter=notes)
            except DamagedCheckpoint:
                _put_aside(Path(runs) / experiment.identity, Path(runs))
                run = train(experiment, runs=runs, reporter=notes)
        text, status = accuracies(run.result), "finished"
    except SoundnessError as alarm:
        status, text = "alarm", str(alarm)
    except BlockingIOError:
        status = "elsewhere"
    except (ValueError, OSError, ArithmeticError) as fault:
        text = str(fault)
    except Exception:
        text = "\n".join(traceback.format_exc().strip().splitlines()[-3:])
    return {"status": status, "text": text, "seconds": time.perf_counter() - started}


class _Notes(Reporter):
    """Leaves word in the run's folder of how it gets on, for whoever watches from another process."""

    def __init__(self, folder: Path) -> None:
        self.path, self.total, self.done, self.text, self.last = folder / "progress.json", 1, 0, "begins", 0.0

    def train(self, steps: int, per_epoch: int, finished: int) -> None:
        self.total, self.done = steps, finished

    def step(self, loss: torch.Tensor) -> None:
        self.done += 1
        self.text = "trains"
        self._write()

    def epoch(self, record: dict[str, Any]) -> None:
        self.text = f"epoch {record['epoch']}, loss {record['loss']:.3f}"
        self._write()

    def stage(self, text: str) -> None:
        self.text = text
        self._write()

    def _write(self) -> None:
        if Here.stopping.is_set():
            raise Stopped
        if time.monotonic() - self.last > 1 and self.path.parent.exists():
            self.last = time.monotonic()
            self.path.write_text(json.dumps({"text": self.text, "done": self.done, "total": self.total}), "utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *fault: object) -> None:
        self.path.unlink(missing_ok=True)


def _said(runs: Path, planned: Iterable[Planned]) -> dict[str, dict[str, Any]]:
    found = {}
    for one in planned:
        try:
            found[one.identity] = json.loads((runs / one.training / "progress.json").read_text("utf-8"))
        except (OSError, ValueError):  # not begun, or being written
            continue
    return found


def accuracies(result: Mapping[str, Any]) -> str:
    """Standard, attacked and certified accuracy in a line."""
    sides = {
        "standard": result["standard"],
        **{side: result["bracket"][side] for side in ("attacked", "certified")},
    }
    return ", ".join(f"{name} {100 * value:.1f} %" for name, value in sides.items() if value is not None)


def _put_aside(path: Path, runs: Path) -> Path:
    aside = runs / ".damaged"
    aside.mkdir(exist_ok=True)
    free = (aside / f"{path.name}-{number}" for number in itertools.count(1))
    return path.rename(next(place for place in free if not place.exists()))
