"""Sweeps: from ``key=a,b,c`` to a plan of runs, and carrying it out so that nothing is lost or done twice."""

from __future__ import annotations

import ast
import itertools
import json
import math
import operator
import os
import re
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch

from holdfast.certify import SoundnessError
from holdfast.component import parse_number
from holdfast.data import Images
from holdfast.experiments.experiment import Experiment
from holdfast.experiments.folder import Run
from holdfast.experiments.launchers import Here, Launcher, Stopped
from holdfast.experiments.recipe import apply_all, parse_yaml, put, read_recipe
from holdfast.experiments.run import train
from holdfast.inference import mix_seed
from holdfast.objectives import Objective, Progress
from holdfast.training import Reporter
from holdfast.training.checkpoint import DamagedCheckpoint

_CALL = re.compile(r"(range|uniform|loguniform|of)\((.*)\)\s*", re.DOTALL)
TRIES = 3
"""How often a run is tried whose worker dies."""
MOST_VALUES = 10_000


@dataclass(frozen=True)
class Listed:
    """Overrides of which each run takes one; a single one is for all runs."""

    choices: tuple[dict[str, Any], ...]
    """Values by dotted keys."""
    name: str = ""
    """What the choice is called, where its values have words of their own."""
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Drawn:
    """A key whose value is drawn for every trial, uniformly or by its logarithm."""

    key: str
    low: float
    high: float
    logarithm: bool

    def draw(self, trial: int) -> float:
        """The same for the same key and trial, however many there are; four digits."""
        share = np.random.default_rng([zlib.crc32(self.key.encode()), trial]).random()
        if self.logarithm:
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        return float(f"{value:.4g}")


@dataclass(frozen=True)
class Derived:
    """A key that is computed from others: ``of(60000 / data.train_size)``."""

    key: str
    formula: str

    def value(self, settings: Mapping[str, Any]) -> float:
        """By the settings that stand before it; a whole number where it is one."""
        text = f"{self.key}=of({self.formula})"
        try:
            found = float(_compute(ast.parse(self.formula, mode="eval").body, settings, text))
        except (TypeError, OverflowError) as fault:
            raise ValueError(f"{text}: {fault}") from fault
        if not math.isfinite(found):
            raise ValueError(f"{text} is {found}")
        return int(found) if found.is_integer() else found


Axis = Listed | Drawn | Derived


@dataclass(frozen=True)
class Planned:
    """One run of a plan."""

    settings: dict[str, Any]
    """What it changes, by dotted keys."""
    labels: dict[str, str]
    """The same in words, for what differs between the runs."""
    experiment: Experiment

    @property
    def identity(self) -> str:
        return self.experiment.identity


def parse_axis(text: str) -> Axis:
    """``key=a,b,c``; ``key=range(16,1024,*2)`` or ``range(0,10,2)``, both ends included; ``key=uniform(0,1)``,
    ``key=loguniform(1e-3,10)``; ``key=of(60000 / other.key)``; ``one.key+other.key=[1,2],[3,4]`` change together.

    Values are YAML; ``key=[a,b]`` is one value that is a list.

    Raises:
        ValueError: none of these.
    """
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ValueError(f"expected KEY=VALUE,VALUE..., given {text!r}")
    keys, value = tuple(part.strip() for part in key.split("+")), value.strip()
    if not all(keys) or len(set(keys)) < len(keys):
        raise ValueError(f"{text!r}: expected different keys, KEY+OTHER=[..],[..]")
    call = _CALL.fullmatch(value)
    if call and len(keys) > 1:
        raise ValueError(f"{text!r}: keys that change together take lists of values, one for each key")
    if call and call[1] == "of":
        try:
            ast.parse(call[2], mode="eval")
        except SyntaxError as fault:
            raise ValueError(f"{text!r} is no formula: numbers, dotted keys, + - * / // **") from fault
        return Derived(key, call[2])
    if call and call[1] == "range":
        return Listed(tuple({key: number} for number in _range(call[2], text)))
    if call:
        ends = [parse_number(part) for part in call[2].split(",")]
        logarithm = call[1] == "loguniform"
        if len(ends) != 2 or ends[0] >= ends[1] or (logarithm and ends[0] <= 0):
            raise ValueError(f"{text!r}: expected {call[1]}(LOW, HIGH){' above 0' if logarithm else ''}")
        return Drawn(key, ends[0], ends[1], logarithm)
    values = parse_yaml(key, f"[{value}]")
    if not values:
        raise ValueError(f"{text!r} has no values")
    if len(keys) == 1:
        return Listed(tuple({key: one} for one in values))
    for one in values:
        if not isinstance(one, list) or len(one) != len(keys):
            raise ValueError(f"{text!r}: expected lists of {len(keys)} values, [..],[..], given {one!r}")
    return Listed(tuple(dict(zip(keys, one, strict=True)) for one in values))


def _range(inside: str, text: str) -> list[float]:
    parts = [part.strip() for part in inside.split(",")]
    if len(parts) not in (2, 3):
        raise ValueError(
            f"{text!r}: expected range(FIRST, LAST), range(FIRST, LAST, STEP) or range(FIRST, LAST, *FACTOR)"
        )
    first, last = parse_number(parts[0]), parse_number(parts[1])
    step = parts[2] if len(parts) == 3 else "1"
    by = parse_number(step.removeprefix("*"))
    multiplies = step.startswith("*")
    if first > last or (multiplies and (by <= 1 or first <= 0)) or by <= 0:
        raise ValueError(f"{text!r} never gets from {first:g} to {last:g}")
    count = math.log(last / first) / math.log(by) if multiplies else (last - first) / by
    if count > MOST_VALUES:
        raise ValueError(f"{text!r} has more than {MOST_VALUES} values")
    steps = range(math.floor(count * (1 + 1e-12) + 1e-12) + 1)
    numbers = [first * by**number if multiplies else first + by * number for number in steps]
    return [int(number) if float(number).is_integer() else float(f"{number:.12g}") for number in numbers]


_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"round": round, "min": min, "max": max}


def _compute(node: ast.expr, settings: Mapping[str, Any], text: str) -> float:
    """A formula of numbers, dotted keys and arithmetic; nothing else is understood, and nothing is executed."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = (float(_compute(one, settings, text)) for one in (node.left, node.right))
        try:
            return _OPERATORS[type(node.op)](left, right)
        except (ArithmeticError, OverflowError) as fault:
            raise ValueError(f"{text}: {fault}") from fault
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_compute(node.operand, settings, text)
    known = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
    if known and isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return _FUNCTIONS[node.func.id](*(_compute(one, settings, text) for one in node.args))
    if isinstance(node, ast.Name | ast.Attribute):
        key = ast.unparse(node)
        value: Any = settings
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        try:
            return parse_number(value)
        except ValueError:
            raise ValueError(f"{text}: {key} is {value!r}, not a number") from None
    raise ValueError(f"{text} is no formula: numbers, dotted keys, + - * / // **, round, min and max")


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
            found.setdefault((experiment.identity, *words), Planned(changes | {"seed": seed}, own, experiment))
    return list(found.values())


def in_words(value: Any) -> str:
    """A value of a recipe, short."""
    if isinstance(value, Mapping):
        inner = ", ".join(f"{k}={in_words(v)}" for k, v in value.items() if k != "name")
        name = str(value.get("name", ""))
        return f"{name}({inner})" if name and inner else name or inner
    if isinstance(value, list):
        return "[" + ", ".join(map(in_words, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def standing(run: Run) -> Literal["finished", "begun", "damaged", "new"]:
    """What a run's folder holds; damaged is what cannot be read, though it is there."""
    if run.path.exists() and not run.path.is_dir():
        return "damaged"
    if not (run.path / "experiment.yaml").exists() and not run.finished:
        return "new"
    try:
        if run.experiment.identity != run.path.name:
            return "damaged"
        if run.finished and run.result:
            return "finished"
    except (OSError, ValueError, TypeError):
        return "damaged"
    return "begun"


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
        run = Run(runs / one.identity)
        state = standing(run)
        if state == "finished":
            outcomes[one.identity] = Outcome(one, "finished", accuracies(run.result))
        elif state == "damaged":
            watcher.say(f"{run.path} is damaged: kept as {_put_aside(run.path)}, begun anew")
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
            for one in [one for one in elsewhere.values() if _is_free(Run(runs / one.identity))]:
                submit([elsewhere.pop(one.identity)])  # it goes on, or finds the run finished
            time.sleep(0 if pending else 1)
            watcher.look(_said(runs, [one.identity for one in pending.values()]))
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


def _is_free(run: Run) -> bool:
    try:
        with run.claimed():
            return True
    except BlockingIOError:
        return False


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
                _put_aside(Path(runs) / experiment.identity)
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


def _said(runs: Path, identities: Iterable[str]) -> dict[str, dict[str, Any]]:
    found = {}
    for identity in identities:
        try:
            found[identity] = json.loads((runs / identity / "progress.json").read_text("utf-8"))
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


def _put_aside(path: Path) -> Path:
    aside = path.parent / ".damaged"
    aside.mkdir(exist_ok=True)
    free = (aside / f"{path.name}-{number}" for number in itertools.count(1))
    return path.rename(next(place for place in free if not place.exists()))


@dataclass(frozen=True)
class Cost:
    """What a plan's training will take, from the seconds of a few batches."""

    runs: int
    batches: int
    seconds: float
    """Of one worker on this machine, without validation and evaluation."""


def estimate(plan: Sequence[Planned], most: int = 6, workers: int = 1) -> Cost:
    """Time a batch of each kind of training in the plan, of at most so many kinds; the others take their mean.

    Args:
        workers: how many share this machine's cores.

    Raises:
        ValueError, OSError: the data, or a model that does not take them.
    """
    seconds: dict[str, float] = {}
    sizes: dict[str, int] = {}
    total, batches = 0.0, 0
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, min(threads, (os.cpu_count() or 1) // workers)))
    try:
        for one in plan:
            total, batches = _add_cost(one.experiment, seconds, sizes, most, total, batches)
    finally:
        torch.set_num_threads(threads)
    return Cost(len(plan), batches, total)


def _add_cost(
    experiment: Experiment, seconds: dict[str, float], sizes: dict[str, int], most: int, total: float, batches: int
) -> tuple[float, int]:
    """One run's batches and seconds on top of the others'."""
    objective = experiment.objective
    if objective is None:
        raise ValueError("the recipe has no objective: there is nothing to train")
    source = experiment.data.model_dump_json()
    parts = experiment.model, objective, experiment.threat, experiment.training.batch_size
    kind = " ".join([experiment.data.name, *map(str, parts)])
    new = kind not in seconds and len(seconds) < most
    if new or (source not in sizes and experiment.data.train_size is None):
        images = experiment.data.load().train
        sizes[source] = images.epoch_size
        if new:
            seconds[kind] = _seconds_of_a_batch(experiment, objective, images)
    images_per_epoch = sizes.get(source) or experiment.data.train_size or 1
    number = experiment.training.plan(images_per_epoch, objective.steps_per_batch).total
    return total + number * seconds.get(kind, float(np.mean(list(seconds.values())))), batches + number


def _seconds_of_a_batch(experiment: Experiment, objective: Objective, images: Images) -> float:
    """Of the second: the first warms up."""
    device = experiment.engine.start(alone=True).device
    x, y = (part.to(device) for part in images.batch(slice(experiment.training.batch_size)))
    with torch.random.fork_rng():
        torch.manual_seed(mix_seed(experiment.seed))
        model = experiment.model.build(images.shape, len(images.classes)).train().to(device)
        for _ in range(2):
            started = time.perf_counter()
            objective.loss(model, x, y, experiment.threat, Progress.end()).total.backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
    return time.perf_counter() - started
