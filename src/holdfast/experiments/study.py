"""Studies: published experiments, each a plan of runs, its table and figures, and the published numbers beside."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

import pandas as pd
import yaml
from pydantic import ValidationError, model_validator

from holdfast.analysis.staircase import SHIFT, STAIRS, staircase
from holdfast.component import Settings, explain, nearest, parse_number
from holdfast.experiments.analyses import SeparationAnalysis
from holdfast.experiments.comparison import compare, read_curves
from holdfast.experiments.insight import analyze
from holdfast.experiments.recipe import apply_all, parse_yaml
from holdfast.experiments.store import Record, latex, read_record
from holdfast.experiments.sweep import Axis, Listed, Planned, parse_axis, plan
from holdfast.files import write_text
from holdfast.plots import save_figure
from holdfast.plots.landscape import band_figure
from holdfast.plots.neural_collapse import collapse_figure
from holdfast.plots.results import bars_figure, curves_figure, lines_figure, scatter_figure
from holdfast.plots.staircase import staircase_figure
from holdfast.threat import Threat
from holdfast.training import Reporter

Choices = dict[str, dict[str, dict[str, Any]]]
"""By the name of a choice its words, and by each the overrides it stands for."""
SHARES = ("standard", "attacked", "certified", "train.", "bracket.", "gap", "attacked_gap", "certified_at.")
"""What results begin with that are shown in per cent."""
LEAST_IMAGES = 30
NONE = "–"


class Digits(Settings):
    """What is different on scikit-learn's digits."""

    over: dict[str, Any] = {}
    """Axes in place of those of the same name."""
    cases: Choices = {}
    set: dict[str, Any] = {}
    """Overrides after all others."""


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


@dataclass(frozen=True)
class Report:
    """What came of a study."""

    folder: Path
    headings: list[str]
    rows: list[list[str]]
    figures: list[Path] = field(default_factory=list)


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
            seeds=shrinking.number("seeds", one.seeds, 1),
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


def report_study(
    study: Study, planned: Sequence[Planned], runs: Path, folder: Path, *, digits: bool = False
) -> Report:
    """Table and figures of the runs that are finished; published curves are of the study's own data only."""
    words = list(dict.fromkeys(key for one in planned for key in one.labels if key in _label_names(study)))
    records = []
    for one in planned:
        record = read_record(runs / one.identity)
        own = {key: one.labels.get(key, NONE) for key in words}
        records.append(replace(record, values=record.values | own))
    labels = [*words, *study.rows]
    radii = next((view for view in study.views if view.kind == "radii"), None)
    if radii:
        records = [part for one in records for part in _by_radius(one, radii.y[0])]
    table = _table(study, records, [*labels, "radius"] if radii else labels)
    report = _write(study, folder, table, [*labels, "radius"] if radii else labels, digits)
    for number, view in enumerate(study.views, start=1):
        report.figures.extend(_draw([] if digits else study.published, view, number, records, labels, folder))
    return report


def report_separation(
    study: Study, folder: Path, runs: Path, *, digits: bool, scale: float, reporter: Reporter
) -> Report:
    """How far apart the classes of the study's data sets are; what is not here is left out and named."""
    rows = []
    for label, one in study.separation.items():
        data = "digits" if digits else one["data"]
        examples = max(200, round(scale * 60_000)) if scale < 1 else None
        if examples:
            reporter.stage(
                f"scale {scale:g}: the first {examples} images of each part; a smaller set lies further apart"
            )
        try:
            findings, _ = analyze(
                data,
                SeparationAnalysis(examples=examples),
                f"threat=linf:{one['eps']}",
                runs=runs,
                reporter=reporter,
            )
        except OSError as fault:
            reporter.stage(f"{label} is left out: {fault}")
            continue
        least = findings.tables["distances"].groupby("part")["distance"].min()
        rows.append(
            {"data set": "digits" if digits else label, "seeds": 1}
            | {key: float(least[part]) for key, part in study.columns.items()}
        )
        if digits:
            break
    table = pd.DataFrame(rows, columns=["data set", "seeds", *study.columns])
    for key, part in study.columns.items():
        table[part], table[f"{part}_half"] = table[key], float("nan")
    return _write(study, folder, table, ["data set"], digits)


def report_staircase(study: Study, folder: Path, *, scale: float, reporter: Reporter) -> Report:
    """The fits of the staircase: errors by size of the sample and method, and their figure."""
    sizes = sorted({max(40, round(scale * size)) for size in study.staircase})
    if sizes != study.staircase:
        reporter.stage(f"scale {scale:g}: {study.staircase} points → {sizes}")
    table, curves = staircase(sizes)
    table = table.assign(seeds=1, **{f"{key}_half": float("nan") for key in study.columns.values()})
    report = _write(study, folder, table, ["points", "method"], False)
    shown = ["natural", "llr", "adversarial", "clean-plus-adversarial (1)", "trades (6)"]
    save_figure(staircase_figure(curves, STAIRS.tolist(), SHIFT, shown), folder / "staircase", curves)
    report.figures.append(folder / "staircase.png")
    return report


def _label_names(study: Study) -> set[str]:
    names = {key for one in study.sweeps for key in one.labels}
    return names | {key for one in study.sweeps for part in (one.cases, one.digits.cases) for key in part}


def _by_radius(record: Record, certifier: str) -> list[Record]:
    """A row for each radius at which a run was certified."""
    start = f"certified_at.{certifier}."
    parts = {key.removeprefix(start): value for key, value in record.values.items() if key.startswith(start)}
    return [
        replace(record, values=record.values | {"radius": Threat.parse(key).eps, "certified": value})
        for key, value in parts.items()
        if ":" in key
    ]


def _table(study: Study, records: Sequence[Record], labels: Sequence[str]) -> pd.DataFrame:
    keys = list(dict.fromkeys(study.columns.values()))
    known = {key for one in records for key in one.values}
    found = compare(records, y=[key for key in keys if key in known], by=labels, best=study.best or None)
    for key in keys:
        if key not in found:
            found[key] = found[f"{key}_half"] = float("nan")
    return found


def _write(study: Study, folder: Path, table: pd.DataFrame, labels: Sequence[str], digits: bool) -> Report:
    """Our numbers, and the published ones beside them; on the digits without them, since they are of other data."""
    headings = [*(["data"] if digits else []), *labels, "seeds", *study.columns]
    lines: list[tuple[tuple[str, ...], list[str]]] = []
    for found in table.to_dict("records"):
        own = [found[label] for label in labels]
        cells = [_cell(key, found[key], found[f"{key}_half"]) for key in study.columns.values()]
        first = ["digits"] if digits else []
        lines.append((tuple(map(_key, own)), [*first, *map(_word, own), str(found["seeds"]), *cells]))
    for one in () if digits else study.published:
        count = len(one.rows[0]) - len(one.columns)
        theirs = {tuple(map(_key, row[:count])): row for row in one.rows}
        for key, row in theirs.items():
            if not any(line[:count] == key for line, _ in lines):
                words = [*map(_word, row[:count]), *[NONE] * (len(headings) - count)]
                lines.append(((*key, *[NONE] * (len(labels) - count)), words))
        shown = [heading for heading in study.columns if heading in one.columns]
        for key, line in lines:
            values = dict(zip(one.columns, theirs.get(key[:count], [])[count:], strict=False))
            line += [NONE if values.get(heading) is None else f"{values[heading]}" for heading in shown]
        headings += [f"{heading}, {'published' if one.verified else 'unverified'}" for heading in shown]
    rows = [line for _, line in lines]
    write_text(folder / "table.csv", pd.DataFrame(rows, columns=headings).to_csv(index=False))
    write_text(folder / "table.tex", latex(headings, rows, len(headings) - len(labels) - digits))
    return Report(folder, headings, rows)


def _word(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _key(value: Any) -> str:
    """A label by which rows are matched, the same for 8/255 and 0.03137."""
    try:
        return f"{parse_number(value):.6g}"
    except ValueError:
        return str(value)


def _cell(key: str, value: float, half: float) -> str:
    if math.isnan(value):
        return NONE
    share = key.startswith(SHARES)
    text = f"{100 * value:.2f}" if share else f"{value:.4g}"
    if math.isnan(half):
        return text
    return f"{text} ± {100 * half:.2f}" if share else f"{text} ± {half:.2g}"


def _draw(
    published: Sequence[Published],
    view: View,
    number: int,
    records: Sequence[Record],
    labels: Sequence[str],
    folder: Path,
) -> list[Path]:
    """A view's figures."""
    stem = folder / f"{view.kind}-{number}"
    if view.kind in ("lines", "bars", "scatter"):
        draw: dict[str, Callable[..., Any]] = {
            "lines": lines_figure,
            "bars": bars_figure,
            "scatter": scatter_figure,
        }
        by = [label for label in labels if label != view.x]
        table = compare(records, y=view.y, by=[*by, view.x])
        logs = {} if view.kind == "bars" else {"log_x": view.log_x, "log_y": view.log_y}
        save_figure(draw[view.kind](table, view.x, view.y, by, **logs), stem, table)
        return [stem.with_suffix(".png")]
    if view.kind == "radii":
        table = compare(records, y=["certified"], by=[*labels, "radius"])
        theirs = [
            pd.DataFrame(
                [[f"{row[0]}, published", parse_number(row[1]), row[2] / 100] for row in one.rows],
                columns=[labels[0], "radius", "certified"],
            )
            for one in published
        ]
        table = pd.concat([table, *theirs], ignore_index=True)
        save_figure(lines_figure(table, "radius", ["certified"], labels), stem, table)
        return [stem.with_suffix(".png")]
    if view.kind == "curve":
        curves = read_curves(records, labels)
        table = pd.concat([one.assign(run=label) for label, one in curves.items()], ignore_index=True)
        save_figure(curves_figure(curves), stem, table)
        return [stem.with_suffix(".png")]
    if view.kind == "band":
        table = _bands(records, labels)
        save_figure(band_figure(table), stem, table)
        return [stem.with_suffix(".png")]
    return _collapse(records, labels, folder)


def _bands(records: Sequence[Record], labels: Sequence[str]) -> pd.DataFrame:
    parts = []
    for one in records:
        history = pd.read_json(one.path / "history.jsonl", lines=True)
        if "landscape_loss_low" in history:
            columns = {"epoch": "epoch", "landscape_loss_low": "loss_low", "landscape_loss_high": "loss_high"}
            words = ", ".join(str(one.values[label]) for label in labels)
            parts.append(history[[*columns]].rename(columns=columns).assign(run=words))
    return pd.concat(parts, ignore_index=True)


def _collapse(records: Sequence[Record], labels: Sequence[str], folder: Path) -> list[Path]:
    """A figure for each combination of labels, mean and range over its seeds."""
    groups: dict[str, list[pd.DataFrame]] = {}
    for one in records:
        path = one.path / "neural-collapse.parquet"
        if path.is_file():
            words = "-".join(str(one.values[label]) for label in labels)
            groups.setdefault(words, []).append(pd.read_parquet(path).assign(run=words))
    figures = []
    for words, parts in groups.items():
        table = pd.concat(parts, ignore_index=True)
        plain = re.sub(r"[^\w-]+", "-", words)
        stem = folder / f"collapse-{plain}"
        save_figure(collapse_figure(table, "last features"), stem, table)
        figures.append(stem.with_suffix(".png"))
    return figures
