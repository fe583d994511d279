"""What comes of a study: the table with the published numbers beside ours, and the figures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from holdfast.analysis.staircase import SHIFT, STAIRS, staircase
from holdfast.component import parse_number
from holdfast.experiments.analyses import SeparationAnalysis
from holdfast.experiments.records.comparison import compare, read_curves
from holdfast.experiments.records.record import Record, read_record
from holdfast.experiments.records.selection import latex
from holdfast.experiments.runs.analysis import analyze
from holdfast.experiments.runs.folder import Run
from holdfast.experiments.studies.claims import Answered, answer
from holdfast.experiments.studies.study import Published, Study, View
from holdfast.experiments.sweeps.sweep import Planned
from holdfast.files import write_text
from holdfast.listeners import Reporter
from holdfast.numbers import NONE, Mean
from holdfast.plots import save_figure
from holdfast.plots.landscape import band_figure
from holdfast.plots.neural_collapse import collapse_figure
from holdfast.plots.results import bars_figure, curves_figure, lines_figure, scatter_figure
from holdfast.plots.staircase import staircase_figure
from holdfast.threat import Threat

STAIRCASE_SEEDS = (1, 2, 3)
"""Of the samples that are fitted; the first is that of the figure."""


@dataclass(frozen=True)
class Report:
    """What came of a study."""

    folder: Path
    headings: list[str]
    rows: list[list[str]]
    figures: list[Path] = field(default_factory=list)
    claims: list[Answered] = field(default_factory=list)


def report_study(
    study: Study,
    planned: Sequence[Planned],
    runs: Path,
    folder: Path,
    *,
    digits: bool = False,
    missing: Sequence[Planned] = (),
) -> Report:
    """Table and figures of the runs that are finished; published curves are of the study's own data only.

    Args:
        missing: runs of the study that are not: the claims are answered by the seeds that have all of theirs.
    """
    words = list(dict.fromkeys(key for one in planned for key in one.labels if key in _label_names(study)))
    records = []
    for one in planned:
        record = read_record(runs / one.folder)
        own = {key: one.labels.get(key, NONE) for key in words}
        records.append(replace(record, values=record.values | own))
    labels = [*words, *study.rows]
    radii = next((view for view in study.views if view.kind == "radii"), None)
    if radii:
        records = [part for one in records for part in _by_radius(one, radii.y[0])]
    table = _table(study, records, [*labels, "radius"] if radii else labels)
    report = _write(study, folder, table, [*labels, "radius"] if radii else labels, digits)
    lacking = {one.experiment.seed for one in missing}
    _answer(report, study, [one for one in records if one.values.get("seed") not in lacking])
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
        table[part], table[f"{part}_half"], table[f"{part}_n"] = table[key], float("nan"), 1
    report = _write(study, folder, table, ["data set"], digits)
    _answer(report, study, [_row(row) for row in rows])
    return report


def report_staircase(study: Study, folder: Path, *, scale: float, reporter: Reporter) -> Report:
    """The fits of the staircase: errors by size of the sample and method, and their figure."""
    sizes = sorted({max(40, round(scale * size)) for size in study.staircase})
    if sizes != study.staircase:
        reporter.stage(f"scale {scale:g}: {study.staircase} points → {sizes}")
    fits = [staircase(sizes, seed=seed) for seed in STAIRCASE_SEEDS]
    curves = fits[0][1]
    rows = pd.concat([one.assign(seed=seed) for seed, (one, _) in zip(STAIRCASE_SEEDS, fits, strict=True)])
    found: list[dict[str, Any]] = []
    for (points, method), group in rows.groupby(["points", "method"], sort=False):
        row: dict[str, Any] = {"points": points, "method": method, "seeds": len(group)}
        for key in study.columns.values():
            row |= {key + part: value for part, value in Mean.of(group[key].to_numpy()).columns.items()}
        found.append(row)
    report = _write(study, folder, pd.DataFrame(found), ["points", "method"], False)
    _answer(report, study, [_row({str(k): v for k, v in row.items()}) for row in rows.to_dict("records")])
    shown = ["natural", "llr", "adversarial", "clean-plus-adversarial (1)", "trades (6)"]
    save_figure(staircase_figure(curves, STAIRS.tolist(), SHIFT, shown), folder / "staircase", curves)
    report.figures.append(folder / "staircase.png")
    return report


def _answer(report: Report, study: Study, records: Sequence[Record]) -> None:
    """The study's claims by these runs, beside the table and in ``claims.json``."""
    report.claims.extend(answer(claim, records, best=study.best) for claim in study.claims)
    if report.claims:
        write_text(report.folder / "claims.json", json.dumps([one.plain for one in report.claims], indent=1) + "\n")


def _row(values: dict[str, Any]) -> Record:
    """A row of a table that no run stands behind, for claims."""
    return Record(Path(" ".join(map(str, values.values()))), "finished", values)


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
            found[f"{key}_n"] = 0
    return found


def _write(study: Study, folder: Path, table: pd.DataFrame, labels: Sequence[str], digits: bool) -> Report:
    """Our numbers, and the published ones beside them; on the digits without them, since they are of other data."""
    headings = [*(["data"] if digits else []), *labels, "seeds", *study.columns]
    lines: list[tuple[tuple[str, ...], list[str]]] = []
    for found in table.to_dict("records"):
        own = [found[label] for label in labels]
        means = {key: Mean(found[key], found[f"{key}_half"], found[f"{key}_n"]) for key in study.columns.values()}
        cells = [mean.text(key, found["seeds"]) for key, mean in means.items()]
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
    return _collapse_figures(records, labels, folder)


def _bands(records: Sequence[Record], labels: Sequence[str]) -> pd.DataFrame:
    parts = []
    for one in records:
        history = Run(one.training).history
        if "landscape_loss_low" in history:
            columns = {"epoch": "epoch", "landscape_loss_low": "loss_low", "landscape_loss_high": "loss_high"}
            words = ", ".join(str(one.values[label]) for label in labels)
            parts.append(history[[*columns]].rename(columns=columns).assign(run=words))
    return pd.concat(parts, ignore_index=True)


def _collapse_figures(records: Sequence[Record], labels: Sequence[str], folder: Path) -> list[Path]:
    """A figure for each combination of labels, mean and range over its seeds."""
    groups: dict[str, list[pd.DataFrame]] = {}
    for one in records:
        path = one.training / "neural-collapse.parquet"
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
