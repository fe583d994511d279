"""Auditing the certificates of a finished evaluation, hard."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from holdfast.evaluation.alarm import Watch, claims_of
from holdfast.evaluation.audit import Audit, Effort, audit, closest_first
from holdfast.experiments.runs.evaluation import tell_imports, test_images
from holdfast.experiments.runs.folder import Run, find_run
from holdfast.experiments.runs.reported import alarm_kept, read_evaluation
from holdfast.listeners import Reporter

CORNERS = 10
"""Steps to a worst corner from each start."""


def audit_run(
    name: str | Path,
    *,
    steps: int = 100,
    restarts: int = 5,
    runs: str | Path = "runs",
    reporter: Reporter | None = None,
) -> tuple[Audit, Run]:
    """Attack every image that a deterministic certifier of an evaluation certified, towards every other class, at
    eps and at the certified radius; what was found, and the evaluation.

    Args:
        name: a training, whose latest evaluation is audited, or an evaluation.
        steps, restarts: of projected descent, for each class and radius.

    Raises:
        FileNotFoundError: no such run, or no evaluation of it.
        ValueError: the evaluation has no deterministic certificates, or the images are others by now.
        SoundnessError: a certificate is contradicted; the example is kept beside the evaluation, as ``alarm.npz``.
    """
    reporter = reporter or Reporter()
    run = find_run(name, Path(runs)).evaluated
    experiment = run.experiment
    proofs = [one for one, guarantee in run.result["guarantees"].items() if guarantee == "deterministic"]
    if not proofs:
        raise ValueError(f"{run.path} has no deterministic certificates: there is nothing to audit")
    tell_imports(experiment, reporter)
    device = experiment.engine.start(alone=True).device
    model = run.model().to(device)
    test = test_images(experiment, experiment.data.load(), reporter)
    images, labels, evaluation = read_evaluation(run, experiment, model, test)
    x, table = images.to(device), evaluation.table
    claims = claims_of(table, proofs, evaluation.certifiers)
    margins = {
        one: torch.from_numpy(table[f"{one}.margin"].to_numpy()) for one in proofs if f"{one}.margin" in table
    }
    rows = closest_first(claims, margins, experiment.test_threat.eps)
    reporter.stage(f"audit of {len(rows)} certified images of {run.path}")
    with alarm_kept(run, "test"):
        found = audit(
            Watch(evaluation.subject, x, experiment.test_threat),
            claims,
            x,
            labels.to(device),
            rows,
            Effort(corners=CORNERS, steps=steps, restarts=restarts, targets=None),
            seed=experiment.seed,
            batch_size=experiment.evaluation.batch_size,
            tell=partial(reporter.work, "audit"),
        )
    return found, run
