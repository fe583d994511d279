"""Evaluating a model that was trained here, or any other, into a folder of its own."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from holdfast.component import foreign_modules
from holdfast.data import Images, Splits, drawn
from holdfast.evaluation import certified_at, evaluate
from holdfast.evaluation.sanity import covers_box, excessive_radius
from holdfast.experiments.recipes.experiment import Experiment
from holdfast.experiments.recipes.overrides import apply_all
from holdfast.experiments.runs import untrained
from holdfast.experiments.runs.folder import Run, find_run
from holdfast.experiments.runs.reported import (
    alarm_kept,
    already,
    draw_adversarial,
    draw_curve,
    finished_as_asked,
    keep_adversarial,
    make_curve,
    report_further,
)
from holdfast.files import write_json
from holdfast.inference import check_inputs, check_logits, device_of, frozen_eval, mix_seed, rehearse
from holdfast.listeners import Reporter


def evaluate_run(
    name: str | Path,
    *overrides: str,
    runs: str | Path = "runs",
    again: bool = False,
    reporter: Reporter | None = None,
) -> Run:
    """Evaluate the model of a training under another threat, on other data or by other means, into a folder below
    it.

    What the overrides leave open is as in the evaluation that is named, or in the first one of the training. Where
    the evaluation is there, and they name another curve or more adversarial images to keep, those alone are made.

    Args:
        name: the folder of a training or of an evaluation, or its name (or the beginning of one) in ``runs``.
        overrides: ``threat=...``, ``evaluation.*=...``, ``data=...`` (test images of another set),
            ``data.root=...`` or ``engine.*=...``.
        again: evaluate anew what is finished.

    Raises:
        ValueError: an override of something that only a new training could change, or one that does not fit.
        FileNotFoundError: no such run, or it holds no trained model.
    """
    named, reporter = find_run(name, Path(runs)), reporter or Reporter()
    trained = named.training
    base = named if named.is_evaluation or not named.evaluations else named.evaluations[0]
    if not named.is_evaluation and len(named.evaluations) > 1 and not overrides:
        reporter.stage(f"{named.path} has {len(named.evaluations)} evaluations; this is about the first")
    settings = base.experiment.model_dump(mode="json")
    # A default asks for nothing.
    chosen = base.experiment.evaluation.model_fields_set
    settings["evaluation"] = asked = {key: settings["evaluation"][key] for key in chosen}
    asked["threat"] = asked.get("threat") or settings["threat"]
    if any(override.startswith("data.") for override in overrides):
        asked["data"] = asked.get("data") or settings["data"]
    experiment = apply_all(settings, [_of_evaluation(override) for override in overrides])
    tell_imports(experiment, reporter)
    run = trained.evaluation(experiment)
    if not again and finished_as_asked(run, experiment):
        reporter.stage(already(run, experiment.evaluation))
        return run
    model = trained.model()
    splits = experiment.data.load()
    reporter.stage(experiment.data.told(splits))
    evaluate_into(run, experiment, model, splits, reporter, again=again)
    return Run(run.path)


def tell_imports(experiment: Experiment, reporter: Reporter) -> None:
    """Say what code from elsewhere a recipe brings in.

    Raises:
        ValueError: some of it cannot be imported.
    """
    for module, file in foreign_modules(experiment).items():
        reporter.stage(f"imports {module} from {file}")


def _of_evaluation(override: str) -> str:
    """An override as it changes the evaluation alone."""
    key = override.split("=")[0]
    first = key.split(".")[0]
    if first in ("threat", "data") and key != "data.root":
        return f"evaluation.{override}"
    if first not in ("evaluation", "engine") and key != "data.root":
        raise ValueError(
            f"{override!r} would change the training; an evaluation can change threat, data and evaluation"
        )
    return override


def evaluate_model(
    recipe: Mapping[str, Any],
    *overrides: str,
    runs: str | Path = "runs",
    again: bool = False,
    reporter: Reporter | None = None,
) -> Run:
    """Evaluate a model that nobody trained here, into a folder below that of the model in ``runs``.

    The model's folder is named by its weights; the same weights in edited code that answers otherwise have another
    one.

    Args:
        recipe: ``data``, ``model`` with ``weights`` or ``package.module:factory``, ``threat``, ``evaluation``.
        overrides: ``key=value`` on top.
        again: evaluate anew what is finished.

    Raises:
        ValueError, OSError: the recipe, the data or the weights are at fault; nothing was written.
    """
    experiment = apply_all(copy.deepcopy(dict(recipe)), overrides)
    reporter = reporter or Reporter()
    tell_imports(experiment, reporter)
    engine = experiment.engine.start(alone=True)
    splits = experiment.data.load()
    reporter.stage(experiment.data.told(splits))
    test, seed = splits.test, mix_seed(experiment.seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = experiment.model.build(test.shape, len(test.classes)).eval()
    if device_of(model).type == "meta":
        raise ValueError("the model's weights are on the device meta, where they have no values: load them first")
    model = model.to(engine.device)
    rehearse_evaluation(experiment, model, test)
    about = Run(untrained.folder_of(model, Path(runs)))
    run = about.evaluation(experiment)
    if not again and finished_as_asked(run, experiment):
        reporter.stage(already(run, experiment.evaluation))
        return run
    if not (about.path / "model.json").is_file():
        about.begin(experiment.training_recipe(), experiment.model_dump(mode="json"), engine.device)
        probes, _ = test.batch(drawn(test.labels, untrained.PROBES, 0))
        untrained.write(about.path, model, probes, len(test.classes), seed)
    evaluate_into(run, experiment, model, splits, reporter, again=again)
    return Run(run.path)


def rehearse_evaluation(experiment: Experiment, model: nn.Module, test: Images) -> None:
    """The checks that the evaluation will make, and two examples through the certifiers; no threat, that of the
    training neither, may take in the whole box, as where eps was meant in pixels."""
    x, y = test.batch(slice(256))
    for threat in (experiment.threat, experiment.test_threat):
        if covers_box(threat, x):
            raise ValueError(*excessive_radius(threat, x))
    check_inputs(x, y, experiment.test_threat)
    device = device_of(model)
    x, y = x[:2].to(device), y[:2].to(device)
    with frozen_eval(model):
        logits = rehearse(model, x, int(test.labels.max()) + 1)
        check_logits(logits, y, masks=True)
    for certifier in experiment.evaluation.certifiers:
        certifier.brief(model, x, y, experiment.test_threat)


def evaluate_into(
    run: Run, experiment: Experiment, model: nn.Module, splits: Splits, reporter: Reporter, *, again: bool = False
) -> None:
    """The sandwich on the test images, its curve, the training images beside it, and the result, in a folder; where
    they are there, what is asked of them further (see ``reported``).

    Raises:
        ValueError: the model does not take these images, or a certifier cannot handle it; nothing was written.
        SoundnessError: an attack broke a certified example.
    """
    engine = experiment.engine.start(alone=True)
    model = model.to(engine.device)
    test = test_images(experiment, splits, reporter)
    rehearse_evaluation(experiment, model, test)
    if run.finished and run.complete and not again:
        report_further(run, experiment, model, test, reporter)
        return
    with run.claimed():
        if again:  # only now: what cannot be evaluated throws nothing away
            run.clear()
        run.begin(experiment.evaluation_recipe(), experiment.model_dump(mode="json"), engine.device)
        reporter.begin(run.path)
        _evaluate(run, experiment, model, splits, test, reporter)


def test_images(experiment: Experiment, splits: Splits, reporter: Reporter) -> Images:
    """Those that are evaluated: the training data's own, or others of the same shape and number of classes.

    Raises:
        ValueError: the others are of another shape or have other classes.
    """
    if experiment.evaluation.data is None:
        return splits.test
    others = experiment.evaluation.data.load()
    reporter.stage(experiment.evaluation.data.told(others))
    test, other = splits.test, others.test
    if other.shape != test.shape or len(other.classes) != len(test.classes):
        raise ValueError(
            f"evaluation.data={experiment.evaluation.data.name} has images {other.shape} of {len(other.classes)} "
            f"classes, the model was made for {test.shape} of {len(test.classes)}: they must be alike"
        )
    return other


def _evaluate(
    run: Run, experiment: Experiment, model: nn.Module, splits: Splits, test: Images, reporter: Reporter
) -> None:
    started = time.perf_counter()
    settings, threat = experiment.evaluation, experiment.test_threat
    chosen = drawn(test.labels, settings.examples, settings.draw)
    images, labels = test.batch(chosen)
    with alarm_kept(run, "test"):
        evaluation = evaluate(
            model,
            images,
            labels,
            threat,
            settings.attacks,
            settings.certifiers,
            radii=settings.radii,
            audit=settings.audit,
            lipschitz_examples=settings.lipschitz_examples,
            minutes=settings.minutes,
            seed=experiment.seed,
            batch_size=settings.batch_size,
            on_progress=lambda name, standing, left: reporter.stage(
                (f"{name}: {standing} of {len(labels)} stand" if standing >= 0 else name)
                + (f", {left} left" if left else "")
            ),
            store=run.pieces,
        )
    evaluation = replace(evaluation, table=evaluation.table.assign(index=chosen.numpy()))
    table = evaluation.table
    run.write_examples(table, evaluation.seconds)
    keep_adversarial(run, experiment, evaluation, images)
    for warning in evaluation.summary["warnings"]:
        reporter.stage(f"warning: {warning}")
    draw_adversarial(run, images, evaluation, threat)
    complete = "not_reached" not in evaluation.summary
    if settings.curve_points and threat.eps > 0 and complete:
        with alarm_kept(run, "test"):
            curve = make_curve(experiment, evaluation, images, labels)
        draw_curve(run, experiment, evaluation, curve, reporter)
    radii = certified_at(table, threat, settings.radii, partial=not complete) if settings.radii else None
    result: dict[str, Any] = {
        **evaluation.summary,
        **(
            _on_training_images(run, experiment, model, splits.train, evaluation.subject is model, reporter)
            if complete
            else {}
        ),
        **({"certified_at": _finite(radii)} if radii is not None else {}),
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak_memory(),
    }
    write_json(run.path / "result.json", result)
    if complete:
        run.pieces.clear()


def _finite(found: dict[str, dict[str, float | None]]) -> dict[str, dict[str, float | None]]:
    """Without infinite means, for which JSON has no word."""
    return {
        name: {key: value if value is not None and math.isfinite(value) else None for key, value in one.items()}
        for name, one in found.items()
    }


def _on_training_images(
    run: Run, experiment: Experiment, model: nn.Module, train: Images, plain: bool, reporter: Reporter
) -> dict[str, Any]:
    """The same attacks and the local Lipschitz constant on training images; without certificates.

    Args:
        plain: the classifier is the model itself, not its vote under noise, for which this is not done.
    """
    settings = experiment.evaluation
    if not settings.train_examples or not plain:
        return {}
    images, labels = train.batch(drawn(train.labels, settings.train_examples, settings.draw))
    summary = evaluate(
        model,
        images,
        labels,
        experiment.test_threat,
        settings.attacks,
        lipschitz_examples=settings.lipschitz_examples,
        seed=experiment.seed,
        batch_size=settings.batch_size,
        store=run.pieces,
    ).summary
    kept = ("examples", "standard", "attacked", "bracket", "counts", "local_lipschitz")
    found = {name: summary[name] for name in kept if name in summary}
    reporter.stage(f"training images: {found['counts']['standard']} of {len(labels)} right")
    return {"train": found}


def peak_memory() -> int | None:
    """The largest memory this process has held, in bytes: of the GPU where one was used."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
