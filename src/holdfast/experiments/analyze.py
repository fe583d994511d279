"""Analysing a run: numbers, tables and figures below its folder, and problems for other tools."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from holdfast.certify import export_problems
from holdfast.experiments.analyses import Analysis, Findings, Subject
from holdfast.experiments.experiment import Experiment
from holdfast.experiments.folder import Run, find_run
from holdfast.experiments.recipe import apply_all
from holdfast.files import write_text
from holdfast.inference import frozen_eval
from holdfast.plots import save_figure
from holdfast.threat import Threat
from holdfast.training import Reporter

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
    """Measure a trained run; what was found, and the folder where it was written.

    Args:
        name: the run's folder, or its name (or the beginning of one) in ``runs``.
        overrides: ``threat=...`` or ``data.root=...``.
        beside: other runs, whose histories are shown beside this one's.

    Raises:
        ValueError: an override that would change the training.
        FileNotFoundError: no such run, or it holds no trained model.
    """
    run = find_run(name, Path(runs))
    for override in overrides:
        if override.split("=")[0] not in ("threat", "data.root"):
            raise ValueError(f"{override!r} would change the training; an analysis can change the threat")
    experiment = apply_all(run.experiment.model_dump(mode="json"), overrides)
    others = [find_run(other, Path(runs)) for other in beside]
    model, test = run.model(), experiment.data.load().test
    x, y = test.batch(slice(min(EXAMPLES, len(test))))
    (reporter or Reporter()).stage(f"{analysis.name} of {run.path} in {experiment.threat}")
    with torch.random.fork_rng(), frozen_eval(model):
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        histories = {
            _title(one): [{str(k): v for k, v in row.items()} for row in one.history.to_dict("records")]
            for one in (run, *others)
        }
        findings = analysis.of(
            Subject(model, x, y, experiment.threat, experiment.objective, experiment.optimizer.lr, histories)
        )
    folder = run.path / "analyses" / f"{analysis.name}-{str(experiment.threat).replace('/', '_').replace(':', '-')}"
    for stem, table in findings.tables.items():
        write_text(folder / f"{stem}.csv", table.to_csv(index=False))
    for stem, (draw, table_name) in findings.figures.items():
        save_figure(draw(findings.tables[table_name]), folder / stem, findings.tables[table_name])
    return findings, folder


def _title(run: Run) -> str:
    """A run in words: what it was trained with."""
    experiment: Experiment = run.experiment
    objective = experiment.objective.name if experiment.objective else experiment.model.name
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
    chosen = Threat.parse(threat) if threat else experiment.threat
    table = run.examples
    standing = table["correct"].to_numpy()
    if chosen == experiment.threat:
        for column in table.columns:
            if column.endswith((".verified", ".success")):
                standing = standing & ~table[column].to_numpy().astype(bool)
    rows = table["index"].to_numpy()[standing][:examples]
    if not len(rows):
        raise ValueError(f"{run.path} leaves no test image undecided in {chosen}")
    x, y = experiment.data.load().test.batch(torch.from_numpy(rows.copy()))
    return export_problems(run.model(), x, y, chosen, folder, indices=rows.tolist()), len(rows)
