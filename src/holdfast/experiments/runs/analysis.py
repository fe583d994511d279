"""Analysing a run or a data set: numbers, tables and figures in a folder, and problems for other tools."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pydantic import ValidationError
from torch import Tensor

from holdfast.certify import export_problems
from holdfast.component import explain, nearest
from holdfast.data import Data, drawn, find_data
from holdfast.experiments.analyses import Analysis, DataAnalysis, Findings, ModelAnalysis, Subject
from holdfast.experiments.recipes.experiment import Experiment
from holdfast.experiments.recipes.overrides import apply, apply_all
from holdfast.experiments.runs.folder import Run, find_run
from holdfast.files import write_text
from holdfast.inference import fingerprint, frozen_eval, rehearse
from holdfast.listeners import Reporter
from holdfast.plots import save_figure
from holdfast.threat import Threat

EXAMPLES = 1000
"""Test images that an analysis is given."""


def analyze(
    name: str | Path,
    analysis: Analysis,
    *overrides: str,
    beside: Sequence[str | Path] = (),
    runs: str | Path = "runs",
    reporter: Reporter | None = None,
) -> tuple[Findings, Path]:
    """Measure a trained run, or a data set; what was found, and the folder where it was written.

    Args:
        name: the run's folder, or its name (or the beginning of one) in ``runs``; for an analysis of data the data
            set's name.
        overrides: ``threat=...`` or ``data.root=...``; of a data set ``threat=...`` and ``data.KEY=...``.
        beside: other runs, whose histories are shown beside this one's.

    Raises:
        ValueError: an override that would change the training.
        FileNotFoundError: no such run, or it holds no trained model.
    """
    reporter = reporter or Reporter()
    if isinstance(analysis, DataAnalysis):
        return _analyze_data(str(name), analysis, overrides, Path(runs), reporter)
    if not isinstance(analysis, ModelAnalysis):
        raise ValueError(f"{analysis.name} is measured while a model trains: put it into the recipe's analysis")
    run = find_run(name, Path(runs))
    for override in overrides:
        if override.split("=")[0] not in ("threat", "data.root"):
            raise ValueError(f"{override!r} would change the training; an analysis can change the threat")
    settings = run.experiment.model_dump(mode="json")
    # In the threat of the evaluation that is named, or of the latest one.
    settings["threat"] = run.experiment.test_threat.serialise()
    experiment = apply_all(settings, overrides)
    others = [find_run(other, Path(runs)) for other in beside]
    model, splits = run.model(), experiment.data.load()
    test = splits.test
    chosen = drawn(test.labels, EXAMPLES, experiment.evaluation.draw)
    x, y = test.batch(chosen)
    with frozen_eval(model):
        rehearse(model, x[:2], len(test.classes))
    reporter.stage(f"{analysis.name} of {run.path} in {experiment.threat}")
    with torch.random.fork_rng(), frozen_eval(model):
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        histories = {
            _title(one): [{str(k): v for k, v in row.items()} for row in one.history.to_dict("records")]
            for one in (run, *others)
        }
        tested = run.experiment
        comparable = (
            run.finished and tested.test_threat.norm == experiment.threat.norm and not tested.evaluation.data
        )
        examples = _deterministic(run, chosen) if comparable else None
        findings = analysis.of(
            Subject(
                model,
                x,
                y,
                experiment.threat,
                splits.train,
                experiment.objective,
                experiment.optimizer.lr,
                title=_title(run),
                epoch=_epoch(run),
                kept=run.kept if getattr(analysis, "checkpoints", "") == "all" else {},
                examples=examples,
                attacks=experiment.evaluation.attacks,
                histories=histories,
            )
        )
    return findings, _write(findings, run.training.path / "analyses" / _label(analysis, experiment.threat))


def _analyze_data(
    name: str, analysis: DataAnalysis, overrides: Sequence[str], runs: Path, reporter: Reporter
) -> tuple[Findings, Path]:
    settings: dict[str, Any] = {}
    for override in overrides:
        apply(settings, override)
    known = {"threat": settings.pop("threat", "linf:0"), "data": settings.pop("data", {})}
    if not isinstance(known["data"], dict):
        raise ValueError(f"expected data.KEY=..., given data={known['data']!r}")
    for key in known["data"]:
        if key in Data.model_fields:
            raise ValueError(f"data.{key} has no effect: {analysis.name} takes the published parts whole")
    if settings:
        raise ValueError(f"unknown key {next(iter(settings))!r}; {nearest(next(iter(settings)), known)}")
    threat = Threat.parse(known["threat"])
    try:
        data = find_data(name, **known["data"])
    except ValidationError as fault:
        raise ValueError(explain(fault)) from fault
    train, test = data.read()
    reporter.stage(f"{analysis.name} of {name}, {threat}")
    findings = analysis.of(train, test, threat, reporter)
    plain = re.sub(r"[^\w.-]+", "-", name).strip("-.")
    settings = {key: value for key, value in data.model_dump(mode="json").items() if key != "root"}
    return findings, _write(findings, runs / "analyses" / _label(analysis, threat, plain, settings))


def _label(analysis: Analysis, threat: Threat, data: str = "", settings: dict[str, Any] | None = None) -> str:
    """A folder's name: what was measured, and a digest where any setting is not the default."""
    parts = [analysis.short_name, *([data] if data else []), str(threat).replace("/", "_").replace(":", "-")]
    plain = analysis == type(analysis)() and (not settings or settings == {"name": data} | _defaults(data))
    digest = fingerprint(analysis.model_dump_json(), settings or {})[:6]
    return "-".join(parts if plain else [*parts, digest])


def _defaults(name: str) -> dict[str, Any]:
    """The settings of a data set that needs none."""
    fields = Data.registry[name].model_fields.items() if name in Data.registry else ()
    return {key: field.get_default() for key, field in fields if key != "root" and not field.is_required()}


def _write(findings: Findings, folder: Path) -> Path:
    """The tables and figures, in place of those of an earlier time."""
    if folder.exists():
        shutil.rmtree(folder)
    for stem, table in findings.tables.items():
        write_text(folder / f"{stem}.csv", table.to_csv(index=False))
    for stem, (draw, table_name) in findings.figures.items():
        save_figure(draw(findings.tables[table_name]), folder / stem, findings.tables[table_name])
    return folder


def _deterministic(run: Run, chosen: Tensor) -> pd.DataFrame:
    """The rows of these test images in the per-example table, NaN where they were not evaluated; without what is
    only probable, or about another classifier."""
    unsure = tuple(f"{name}." for name, kind in run.result["guarantees"].items() if kind != "deterministic")
    table = run.examples.set_index("index").reindex(chosen.numpy()).reset_index()
    return table[[name for name in table.columns if not name.startswith(unsure)]] if unsure else table


def _epoch(run: Run) -> int:
    """The epoch whose weights the run kept: that of the best validation where one was watched."""
    history, watched = run.history, f"validation_{run.experiment.training.watch}"
    return int(history["epoch"].iloc[history[watched].argmax() if watched in history else -1])


def _title(run: Run) -> str:
    """A run in words: what it was trained with, and the beginning of its name."""
    experiment: Experiment = run.experiment
    one = experiment.objective or experiment.model
    own = [
        f"{k}={v}" for k, v in one.model_dump().items() if k != "name" and v != type(one).model_fields[k].default
    ]
    objective = f"{one.short_name} ({', '.join(own)})" if own and experiment.objective else one.short_name
    return f"{objective}, {experiment.threat} ({run.path.name[:6]})"


def export_run(
    name: str | Path, folder: Path, *, threat: str | None = None, examples: int = 10, runs: str | Path = "runs"
) -> tuple[Path, int]:
    """Write verification problems of a run's undecided test images; the list of them, and their number.

    Raises:
        ValueError: nothing is undecided, the threat set is no box, or onnx is not installed.
    """
    run = find_run(name, Path(runs))
    experiment = run.experiment
    chosen = Threat.parse(threat) if threat else experiment.test_threat
    table = run.examples
    standing = table["correct"].to_numpy()
    if chosen == experiment.test_threat:
        for column in table.columns:
            if column.endswith((".verified", ".success")):
                standing = standing & ~table[column].to_numpy().astype(bool)
    rows = table["index"].to_numpy()[standing][:examples]
    if not len(rows):
        raise ValueError(f"{run.path} leaves no test image undecided in {chosen}")
    x, y = experiment.test_data.load().test.batch(torch.from_numpy(rows.copy()))
    return export_problems(run.model(), x, y, chosen, folder, indices=rows.tolist()), len(rows)
