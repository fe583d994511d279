"""All runs of a folder as one table, read without torch: select, sort, hand on."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from holdfast.component import nearest, parse_number
from holdfast.experiments.schema import TRAINS_ALIKE_SINCE, schema_of, upgrade
from holdfast.files import is_claimed
from holdfast.foreign import short_name

Status = Literal["finished", "running", "failed", "cut off", "damaged", "old"]
"""``old`` is a result file of the code of Prach and Lampert."""
OF = ("trainings", "evaluations")
RECIPE, OLD_RECIPE, EVALUATIONS, FAILED = "recipe.yaml", "experiment.yaml", "evaluations", "failed.txt"
HISTORY = "history.jsonl"
ELSEWHERE = ("engine", "seed", "schema")
"""Parts of a recipe in which the runs of one mean may differ."""
_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
SIDES = ("attacked", "certified")
CIFAR_TRAIN_PART = 45_000
"""Training images of CIFAR-10 that the code of Prach and Lampert trains on at most, whatever its file says."""


@dataclass(frozen=True)
class Record:
    """A run as one flat row: settings of its recipe and numbers of its result, by dotted names."""

    path: Path
    status: Status
    values: dict[str, Any]
    recipe: dict[str, Any] = field(default_factory=dict)
    """The settings that are not the defaults, of the training and of the evaluation, but for the seed and where it
    ran: what the runs of one mean have in common."""
    answers: Path | None = None
    """The folder of the evaluation that the results are of."""

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def training(self) -> Path:
        """The folder of the training: that of an evaluation is below it."""
        return self.path.parent.parent if self.path.parent.name == EVALUATIONS else self.path


def read_records(runs: Path, of: str = "trainings") -> list[Record]:
    """Every training below a folder with its latest evaluation, or every evaluation, oldest first; and every result
    file of the code of Prach and Lampert.

    ``objective`` stands for ``objective.name``, ``attacked`` and ``certified`` for the accuracy under all attacks
    and by all certifiers together, ``threat`` for that of the evaluation (``trained.threat`` for the other),
    ``gap``, ``attacked_gap`` and ``attacked_gap.NAME`` for how much better training images do, ``last.NAME`` for a
    number of the last epoch, such as ``last.validation_attacked``, and ``processes`` for how many trained, one
    after another.

    Raises:
        ValueError: neither ``trainings`` nor ``evaluations``.
    """
    if of not in OF:
        raise ValueError(f"{of!r} are no records; {nearest(of, OF)}")
    found = []
    for folder, below, files in os.walk(runs):
        path = Path(folder)
        if file := recipe_file(path):
            below.clear()
            parts = evaluations_of(path) if of == "evaluations" else [path]
            found += [(((recipe_file(one) or file).stat().st_mtime), read_record(one, of)) for one in parts]
            continue
        below[:] = sorted(name for name in below if not name.startswith("."))
        texts = [path / name for name in sorted(files) if name.endswith(".yaml")]
        old = [record for text in texts if (record := _old_record(text))]
        found += [(float(record.values.get("end_time", 0)), record) for record in old]
    return [record for _, record in sorted(found, key=lambda pair: pair[0])]


def evaluations_of(training: Path) -> list[Path]:
    """The folders of a training's evaluations, oldest first; of one of version 0.1 the training's own is the
    first."""
    below = [path for path in (training / EVALUATIONS).glob("*") if recipe_file(path)]
    below.sort(key=lambda path: path.stat().st_mtime)
    return [*([training] if (training / OLD_RECIPE).is_file() else []), *below]


def read_record(path: Path, of: str = "trainings") -> Record:
    """The training or the evaluation of this folder.

    Args:
        of: ``evaluations`` where a folder of version 0.1, which is both, is meant as its evaluation.
    """
    below = path.parent.name == EVALUATIONS
    training = path.parent.parent if below else path
    try:
        answers = (
            [path]
            if below or of == "evaluations"
            else [one for one in evaluations_of(path) if (one / "result.json").exists()]
        )
        answers.sort(key=lambda one: (one / "result.json").stat().st_mtime if len(answers) > 1 else 0)
        last = answers[-1] if answers else None
        result = _result(last) if last else None
        recipe, settings = _recipe_of(training, last)
    except (OSError, ValueError, yaml.YAMLError) as fault:
        return Record(path, "damaged", {"fault": " ".join(str(fault).split())})
    values = named(settings, result or {}) | history_values(training)
    values |= {"training": training.name, "evaluations": len(evaluations_of(training))}
    return Record(path, state_of(path, result), values, recipe, last)


def named(settings: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """Settings and results by dotted names, and by the short ones that ``read_records`` tells of."""
    values = flatten(settings) | flatten(result)
    for key in [key for key in values if key.endswith(".name")]:
        values.setdefault(key.removesuffix(".name"), short_name(str(values[key])) or values[key])
    if values.get("model") == "factory" and values.get("model.path"):
        values["model"] = short_name(values["model.path"])
    for side in SIDES:
        values.setdefault(side, values.get(f"bracket.{side}"))
    gaps = {"gap": "standard", "attacked_gap": "bracket.attacked"}
    gaps |= {f"attacked_gap.{name}": f"attacked.{name}" for name in result.get("attacked") or ()}
    for name, key in gaps.items():
        if values.get(f"train.{key}") is not None and values.get(key) is not None:
            values[name] = values[f"train.{key}"] - values[key]
    return values


def state_of(path: Path, result: object) -> Status:
    """How it stands with a run that can be read.

    Args:
        result: what its evaluation found, if there is one.
    """
    parts = [path, *(evaluations_of(path) if path.parent.name != EVALUATIONS else ())]
    if result:
        return "finished"
    if any(is_claimed(one) for one in parts):
        return "running"
    return "failed" if any((one / FAILED).is_file() for one in parts) else "cut off"


def recipe_file(folder: Path) -> Path | None:
    """What says that a folder is a run, and of what; None where it is none."""
    for name in (RECIPE, OLD_RECIPE):
        if (folder / name).is_file():
            return folder / name
    return None


def _stored(folder: Path) -> dict[str, Any]:
    """A stored recipe in the form of its time.

    Raises:
        ValueError: it holds none.
    """
    file = recipe_file(folder) or folder / RECIPE
    found = yaml.load(file.read_text("utf-8"), _YAML)
    if not isinstance(found, Mapping) or not isinstance(found.get("data"), Mapping):
        raise ValueError(f"{file} holds no recipe")
    return dict(found)


def _recipe_of(training: Path, evaluation: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What runs of one mean have in common, and all settings with what was the default when they were written."""
    stored = _stored(training)
    parts = upgrade(stored)
    settings = _settings(training, parts)
    if evaluation and evaluation != training:
        own = upgrade(_stored(evaluation))
        asked = {"threat": own["threat"], "evaluation": own["evaluation"]}
        if own["data"] != parts["data"]:
            asked["evaluation"] = {**own["evaluation"], "data": own["data"]}
        parts = {**parts, **asked, "trained": {"threat": parts.get("threat")}}
        settings = {
            **settings,
            **{key: _settings(evaluation, own)[key] for key in ("evaluation", "seed")},
            **{"threat": own["threat"], "trained": {"threat": parts["trained"]["threat"]}},
        }
    settings = {**settings, "schema": schema_of(stored)}
    common = {key: value for key, value in parts.items() if key not in ELSEWHERE}
    if schema_of(stored) < TRAINS_ALIKE_SINCE:
        common["schema"] = schema_of(stored)
    return flatten(_spelled(common)), flatten(_spelled(settings))


def _settings(folder: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """All settings of a run, as its environment tells; those that are stored where it does not."""
    try:
        found = json.loads((folder / "environment.json").read_text("utf-8")).get("settings")
    except (OSError, ValueError, AttributeError):
        found = None
    return dict(found) if isinstance(found, dict) else recipe


def _spelled(settings: Mapping[str, Any]) -> dict[str, Any]:
    """With a threat both as text and by its parts, however it is written."""
    threat, found = settings.get("threat"), {key: value for key, value in settings.items() if key != "threat"}
    if isinstance(threat, str) and ":" in threat:
        norm, _, eps = threat.partition(":")
        return found | {"threat": threat, "threat.norm": norm, "threat.eps": parse_number(eps)}
    if isinstance(threat, Mapping) and {"norm", "eps"} <= set(threat):
        text = f"{threat['norm']}:{parse_number(threat['eps']):.4g}"
        return found | {f"threat.{key}": value for key, value in threat.items()} | {"threat": text}
    return dict(settings)


def _result(path: Path) -> dict[str, Any] | None:
    """What ``result.json`` says; None where the evaluation is not finished.

    Raises:
        ValueError: it is damaged.
    """
    file = path / "result.json"
    if not file.exists():
        return None
    try:
        result = json.loads(file.read_text("utf-8"))
    except ValueError as fault:
        raise ValueError(f"{file} cannot be read: {fault}") from fault
    bracket = result.get("bracket") if isinstance(result, dict) else None
    if not isinstance(bracket, dict) or not {"standard", "counts"} <= set(result) or not set(SIDES) <= set(bracket):
        raise ValueError(f"{file} cannot be read: it is not a result")
    return dict(result)


def history_lines(training: Path) -> tuple[list[str], list[str]]:
    """The lines of a training's history as JSON: those of epochs, and those of stretches, each from a start or a
    resumption to the next, which stand before the first epoch that they end.

    Raises:
        OSError: there is none.
    """
    lines = (training / HISTORY).read_text("utf-8").splitlines()
    stretches = [line for line in lines if line.startswith('{"stretch"')]
    return [line for line in lines if line and not line.startswith('{"stretch"')], stretches


def processes_of(stretches: Sequence[Mapping[str, Any]]) -> str:
    """How many processes trained one after another: ``2 then 1``."""
    return " then ".join(str(count) for count, _ in itertools.groupby(one["processes"] for one in stretches))


def processes_note(stretches: Sequence[Mapping[str, Any]]) -> str:
    """In words what several processes did each for itself: ``trained by 2 then 1 processes: BatchNorm by process``.

    Empty where one process trained, or where their number changes nothing but rounding.
    """
    divided = dict.fromkeys(name for one in stretches if one["processes"] > 1 for name in one["by_process"])
    return f"trained by {processes_of(stretches)} processes: {', '.join(divided)} by process" if divided else ""


def history_values(training: Path) -> dict[str, Any]:
    """``last.NAME`` of the last epoch and ``first.NAME`` of the first, without lists; ``processes``, and ``note``
    where their number matters. Empty where there is no history, or a damaged one."""
    try:
        epochs, lines = history_lines(training)
        stretches = [json.loads(line) for line in lines]
        ends = {"first": json.loads(epochs[0]), "last": json.loads(epochs[-1])} if epochs else {}
        found = flatten(
            {
                name: {key: value for key, value in epoch.items() if not isinstance(value, list)}
                for name, epoch in ends.items()
            }
        )
        processes, note = processes_of(stretches), processes_note(stretches)
    except (OSError, ValueError, AttributeError, KeyError):
        return {}
    return found | ({"processes": processes} if processes else {}) | ({"note": note} if note else {})


def _old_record(path: Path) -> Record | None:
    """A result file of the code of Prach and Lampert (2025); None for any other YAML file.

    Its names stay; ``data``, ``data.train_size``, ``model``, ``objective``, ``optimizer.lr`` and ``standard`` (or
    ``validation_standard``, where held-out training images were evaluated) are set beside them, so that it can be
    drawn with runs of ours. ``CRA`` of randomised smoothing is an estimate there, so nothing becomes ``certified``.
    """
    try:
        found = yaml.load(path.read_text("utf-8"), _YAML)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(found, dict) or not {"arguments", "configuration", "results"} <= set(found):
        return None
    values = flatten(found)
    data, size = values.get("configuration.dataset.name"), values.get("configuration.dataset.training_size")
    test = bool(values.get("configuration.dataset.use_test_data"))
    if data == "CIFAR10" and size and not test:
        size = min(size, CIFAR_TRAIN_PART)
    own = {
        "data": "cifar10" if data == "CIFAR10" else data,
        "data.train_size": size,
        "model": values.get("configuration.model.name"),
        "objective": values.get("configuration.loss.name"),
        "optimizer.lr": values.get("configuration.optimizer.lr"),
        ("standard" if test else "validation_standard"): values.get("results.eval.Accuracy()"),
    }
    recipe = {key: value for key, value in values.items() if key.startswith("configuration.")}
    return Record(path, "old", values | {key: value for key, value in own.items() if value is not None}, recipe)


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one of dotted names; lists of mappings by position, other lists whole."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        name = f"{prefix}{key}"
        if isinstance(inner, list) and inner and all(isinstance(one, Mapping) for one in inner):
            inner = {str(position): one for position, one in enumerate(inner)}
        if isinstance(inner, Mapping):
            flat |= flatten(inner, f"{name}.")
        else:
            flat[name] = inner
    return flat
