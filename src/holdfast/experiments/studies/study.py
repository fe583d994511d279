"""Studies: published experiments as plans of runs, at any scale, on their own data or on digits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import ValidationError, model_validator

from holdfast.component import Settings, explain, nearest
from holdfast.experiments.recipes.overrides import apply_all, parse_yaml
from holdfast.experiments.studies.claims import Claim
from holdfast.experiments.sweeps.axes import Axis, Listed, parse_axis
from holdfast.experiments.sweeps.sweep import Planned, plan

Choices = dict[str, dict[str, dict[str, Any]]]
"""By the name of a choice its words, and by each the overrides it stands for."""
LEAST_IMAGES = 30


class Digits(Settings):
    """What is different on scikit-learn's digits."""

    over: dict[str, Any] = {}
    """Axes in place of those of the same name."""
    cases: Choices = {}
    set: dict[str, Any] = {}
    """Overrides after all others."""
    seeds: int | None = None
    """As many as a claim needs; as on the study's own data by default."""


class StudySweep(Settings):
    """Some of a study's runs: combinations of values on top of a recipe."""

    recipe: str
    labels: dict[str, str] = {}
    """What tells these runs from the study's others, in words."""
    over: dict[str, Any] = {}
    """By dotted key a value, a list of values, or ``loguniform(..)`` and the like."""
    cases: Choices = {}
    trials: int = 0
    seeds: int = 1
    digits: Digits = Digits()


class View(Settings):
    """A figure."""

    kind: Literal["lines", "bars", "scatter", "curve", "radii", "collapse", "band"]
    """``radii`` draws certified accuracy at evaluation.radii, ``collapse`` and ``band`` what training recorded."""
    x: str = ""
    y: list[str] = []
    log_x: bool = False
    log_y: bool = False


class Published(Settings):
    """Numbers to compare with."""

    source: str
    verified: bool = True
    """Whether the numbers were seen at their source, or are quoted from memory."""
    columns: list[str]
    """Some of the headings of the study's own columns."""
    rows: list[list[Any]]
    """The labels of a row, and a number for each column; accuracies in per cent."""


class Study(Settings):
    """A published experiment."""

    title: str
    shows: str
    """What it shows, in a sentence or three."""
    source: str
    hours: str
    """About how long it takes on one GPU."""
    sweeps: list[StudySweep] = []
    separation: dict[str, dict[str, Any]] = {}
    """Data sets whose class separation is measured: by label ``data`` and ``eps``."""
    staircase: list[int] = []
    """Sizes of the samples of the staircase."""
    columns: dict[str, str] = {"standard": "standard", "under attack": "attacked", "certified": "certified"}
    """By the headings of the table what stands below them."""
    rows: list[str] = []
    """Settings that make rows, beside the labels."""
    best: str = ""
    """Where settings differ within a row, the best by this name is taken."""
    views: list[View] = []
    published: list[Published] = []
    claims: list[Claim] = []
    """What the paper says, as questions that the runs answer."""
    note: str = ""
    """What is different from the publication."""

    @model_validator(mode="after")
    def _make_sense_together(self) -> Self:
        if sum(map(bool, (self.sweeps, self.separation, self.staircase))) != 1:
            raise ValueError("a study has sweeps, or separation, or a staircase")
        for one in self.published:
            if unknown := [heading for heading in one.columns if heading not in self.columns]:
                raise ValueError(f"published: unknown column {unknown[0]!r}; {nearest(unknown[0], self.columns)}")
            lengths = {len(row) for row in one.rows}
            if len(lengths) != 1 or min(lengths) < len(one.columns):
                raise ValueError(f"published: rows of {sorted(lengths)} cells for {len(one.columns)} columns")
        return self


def study_names() -> list[str]:
    """The studies that come with holdfast."""
    return sorted(path.name.removesuffix(".yaml") for path in _folder().iterdir() if path.name.endswith(".yaml"))


def read_study(name: str) -> Study:
    """A study by its name, or from a YAML file.

    Raises:
        ValueError: no such study, or the file is none.
        FileNotFoundError: there is no such file.
    """
    if name in study_names():
        text = (_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    elif name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise FileNotFoundError(f"there is no file {name}")
        text = Path(name).read_text("utf-8")
    else:
        raise ValueError(f"{name!r} is not a study; {nearest(name, study_names())}")
    try:
        return Study.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as fault:
        raise ValueError(f"{name} is not YAML: {fault}") from fault
    except ValidationError as fault:
        raise ValueError(f"{name}: {explain(fault)}") from fault


def _folder() -> Any:
    return resources.files("holdfast.experiments") / "studies"


def plan_study(
    study: Study, *, digits: bool = False, scale: float = 1.0, overrides: Sequence[str] = ()
) -> tuple[list[Planned], list[str]]:
    """The runs of a study, and what was shrunk, in words.

    Args:
        digits: on scikit-learn's digits, with the study's settings for them.
        scale: 0.01 trains on a hundredth of the images shown in all, evaluates on a hundredth of the test images,
            and leaves out training-set sizes above a hundredth of the largest; nothing falls below what works.
        overrides: ``key=value`` on top of every run.

    Raises:
        ValueError: a run that is no experiment, or a scale outside (0, 1].
    """
    if not 0 < scale <= 1:
        raise ValueError(f"expected a scale above 0 and at most 1, given {scale:g}")
    shrinking = _Shrinking(scale, digits)
    found: list[Planned] = []
    for one in study.sweeps:
        axes = [*_axes(one, digits, shrinking), *_overrides(overrides)]
        planned = plan(
            one.recipe,
            axes,
            trials=shrinking.number("trials", one.trials, 3) if one.trials else 0,
            seeds=shrinking.number("seeds", (digits and one.digits.seeds) or one.seeds, 1),
            finish=shrinking.apply,
        )
        found += [replace(run, labels=one.labels | run.labels) for run in planned]
    return found, list(shrinking.notes)


def _overrides(overrides: Sequence[str]) -> list[Axis]:
    axes: list[Axis] = []
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator:
            raise ValueError(f"expected key=value, given {text!r}")
        axes.append(Listed(({key: parse_yaml(key, value)},)))
    return axes


def _axes(one: StudySweep, digits: bool, shrinking: _Shrinking) -> list[Axis]:
    other = one.digits if digits else Digits()
    axes: list[Axis] = []
    for key, value in (one.over | other.over).items():
        if isinstance(value, str) and "(" in value:
            axes.append(parse_axis(f"{key}={value}"))
        else:
            values = value if isinstance(value, list) else [value]
            axes.append(Listed(tuple({key: v} for v in shrinking.sizes(key, values))))
    for name, choices in (one.cases | other.cases).items():
        axes.append(Listed(tuple(choices.values()), name, tuple(choices)))
    return [*axes, *(Listed(({key: value},)) for key, value in other.set.items())]


class _Shrinking:
    """A study on fewer images, for shorter; and what was changed, in words."""

    def __init__(self, scale: float, digits: bool) -> None:
        self.scale, self.digits = scale, digits
        self.notes: dict[str, None] = {}
        self.images: dict[str, int | None] = {}

    def number(self, what: str, value: int, least: int) -> int:
        """A number of so many, at least ``least`` or what it was."""
        smaller = max(min(least, value), round(self.scale * value))
        if smaller != value:
            self.notes[f"{what} {value} → {smaller}"] = None
        return smaller

    def sizes(self, key: str, values: list[Any]) -> list[Any]:
        """Listed sizes up to the scale of the largest, at least the three smallest."""
        if key != "data.train_size" or self.scale == 1:
            return values
        kept = [value for value in values if value <= self.scale * max(values)]
        kept = kept if len(kept) >= 3 else sorted(values)[:3]
        self.notes[f"{key} {min(values)} … {max(values)} → {', '.join(map(str, kept))}"] = None
        return kept

    def apply(self, settings: dict[str, Any]) -> None:
        """Change a recipe."""
        if self.digits:
            data = settings["data"] if isinstance(settings["data"], dict) else {}
            kept = ("train_size", "validation", "components", "split_seed")
            settings["data"] = {"name": "digits", **{key: data[key] for key in kept if key in data}}
        if self.scale == 1:
            return
        training = settings["training"] = dict(settings.get("training", {}))
        for budget in ("presentations", "steps"):
            if training.get(budget):
                training[budget] = self.number(
                    f"training.{budget}", training[budget], 1000 if budget == "presentations" else 20
                )
                break
        else:
            self._epochs(settings, training)
        by_epochs = (
            () if training.get("presentations") or training.get("steps") else ("validate_every", "keep_every")
        )
        for key in by_epochs:
            if training.get(key):
                training[key] = self.number(f"training.{key}", training[key], 1)
        evaluation = settings["evaluation"] = dict(settings.get("evaluation", {}))
        default = 360 if self.digits else 10_000
        for key, value, least in (
            ("examples", default, 50),
            ("train_examples", 200, 20),
            ("lipschitz_examples", 200, 20),
            ("curve_examples", 500, 50),
        ):
            evaluation[key] = self.number(f"evaluation.{key}", evaluation.get(key) or value, least)
        settings["analysis"] = [
            {**one, "every": self.number(f"{one['name']}.every", one["every"], 1)} if "every" in one else one
            for one in settings.get("analysis", [])
        ]

    def _epochs(self, settings: dict[str, Any], training: dict[str, Any]) -> None:
        """Fewer epochs; where not even one is left, one of fewer images."""
        epochs = training.get("epochs", 20)
        training["epochs"] = self.number("training.epochs", epochs, 1)
        share, data = epochs * self.scale, settings["data"]
        if share >= 1 or self.digits or (isinstance(data, dict) and data.get("train_size")):
            return
        data = settings["data"] = dict(data) if isinstance(data, dict) else {"name": data}
        if (count := self._count(settings)) is not None:
            data["train_size"] = max(LEAST_IMAGES, round(share * count))
            self.notes[f"data.train_size {count} → {data['train_size']}"] = None

    def _count(self, settings: dict[str, Any]) -> int | None:
        """Training images; None where the data are not here."""
        name = str(settings["data"]["name"])
        if name not in self.images:
            try:
                self.images[name] = len(apply_all({**settings}, ()).data.load().train)
            except OSError:
                self.images[name] = None
        return self.images[name]
