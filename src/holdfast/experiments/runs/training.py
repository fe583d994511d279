"""Running one experiment: train, evaluate, draw, and leave a folder that says it all."""

from __future__ import annotations

import contextlib
import copy
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from holdfast.attacks import PGD
from holdfast.certify import SoundnessError
from holdfast.data import Images, Splits
from holdfast.evaluation import Evaluation, certified_at, evaluate, sandwich_curve
from holdfast.experiments.recipes.experiment import Experiment
from holdfast.experiments.recipes.overrides import apply_all, resolve
from holdfast.experiments.runs.folder import Run, find_run
from holdfast.experiments.runs.tracking import TrackedReporter, Tracker, trackers
from holdfast.files import whole_file, write_json, write_text
from holdfast.inference import (
    check_inputs,
    check_logits,
    device_of,
    eval_mode,
    fingerprint,
    frozen_eval,
    mix_seed,
    own_inputs,
    rehearse,
)
from holdfast.objectives import Objective, Progress
from holdfast.plots import contact_sheet, sandwich_figure, save_figure
from holdfast.threat import Threat
from holdfast.training import Observer, Reporter, fit

VALIDATION_ATTACK = PGD(steps=10)
"""The attack of the progress line; the evaluation's own attacks are for the last line."""


def train(
    recipe: str | Path | Experiment,
    *overrides: str,
    runs: str | Path = "runs",
    again: bool = False,
    reporter: Reporter | None = None,
    track: Sequence[str | Tracker] = (),
) -> Run:
    """Train and evaluate one experiment: ``train("digits", "objective.kappa=0.3")``.

    A finished run is returned as it is; one that was cut off goes on from its last checkpoint and ends in
    the same result. With ``engine.devices`` above 1 this program is started once more for every further
    device, from its beginning; all take part in the training, and the first alone evaluates and writes.

    Args:
        recipe: the name of a recipe, the path of a YAML file, or an Experiment.
        overrides: ``key=value`` on top of the recipe.
        runs: the folder of runs.
        again: throw away what is there and run anew.
        track: send the numbers to ``tensorboard``, ``wandb``, or any Tracker, too.

    Raises:
        ValueError, OSError: the recipe, the data or a checkpoint is at fault; nothing was written.
        TrainingDiverged: the loss became NaN or inf.
        SoundnessError: an attack broke a certified example.
    """
    experiment = recipe if isinstance(recipe, Experiment) else resolve(recipe, overrides)
    leads = experiment.engine.leads
    followers = trackers(track) if leads else []
    reporter = (leads and reporter) or Reporter()
    run = Run(Path(runs) / experiment.identity)
    if run.finished and not again:
        reporter.stage(f"{run.path} is finished already")
        return run
    if experiment.objective is None:
        raise ValueError("the recipe has no objective: there is nothing to train")
    engine = experiment.engine.start()
    splits = experiment.data.load()
    shape, num_classes = splits.train.shape, len(splits.train.classes)
    with torch.random.fork_rng():
        torch.manual_seed(mix_seed(experiment.seed))
        model = experiment.model.build(shape, num_classes)
    checkpoint = None if again else run.read_checkpoint(model, engine.device)
    plan = experiment.training.plan(splits.train.epoch_size, experiment.objective.steps_per_batch)
    least = plan.smallest_batch // engine.processes
    _rehearse(experiment, model, splits.validation, least)
    watched = experiment.training.watch
    if watched == "certified" and not experiment.evaluation.certifiers:
        raise ValueError("training.watch=certified needs one of evaluation.certifiers")
    _rehearse_evaluation(experiment, model, splits.test)

    with run.claimed() if leads else contextlib.nullcontext():
        if leads:
            if again:
                run.clear()
            run.begin(experiment, engine.device)
            reporter.begin(run.path)
            for tracker in followers:
                tracker.begin(run.path, experiment.model_dump(mode="json"))
        engine.launch()
        count = min(experiment.training.validation_examples, len(splits.validation))
        images, labels = splits.validation.batch(slice(count))

        def validate(model: nn.Module) -> dict[str, float]:
            certifiers = experiment.evaluation.certifiers
            summary = evaluate(
                model, images, labels, experiment.threat, [VALIDATION_ATTACK], certifiers, seed=experiment.seed
            ).summary
            accuracies = {"standard": summary["standard"], **summary["bracket"]}
            return {f"validation_{name}": value for name, value in accuracies.items() if value is not None}

        with _alarm_kept(run, "validation"):
            history = fit(
                model,
                splits.train,
                experiment.objective,
                experiment.threat,
                experiment.optimizer,
                experiment.schedule,
                experiment.training,
                engine,
                seed=experiment.seed,
                validate=validate,
                resume=checkpoint,
                save=partial(run.write_checkpoint, keep_every=experiment.training.keep_every),
                observers=_observers(experiment, model),
                reporter=TrackedReporter(reporter, followers) if followers else reporter,
            )
        if leads:
            run.write_model(model, shape, num_classes)
            for one in experiment.analysis:
                if (table := one.table(history)) is not None:
                    run.write_table(one.name, table)
            _evaluate(run, experiment, model, splits, reporter, sum(record["seconds"] for record in history))
        for tracker in followers:
            tracker.end(run.result)
        engine.wait()
        return run


def _observers(experiment: Experiment, model: nn.Module) -> list[Observer]:
    """What the recipe has measured while the model trains."""
    assert experiment.objective is not None

    def rate(progress: Progress) -> float:
        return experiment.optimizer.lr * experiment.schedule.factor(progress.step, progress.total_steps)

    watches = [one.watch(model, experiment.objective, experiment.threat, rate) for one in experiment.analysis]
    return [watch for watch in watches if watch is not None]


def evaluate_run(
    name: str | Path, *overrides: str, runs: str | Path = "runs", reporter: Reporter | None = None
) -> Run:
    """Evaluate a run's model under another threat or by other means, into a folder below the run's.

    Args:
        name: the run's folder, or its name (or the beginning of one) in ``runs``.
        overrides: ``threat=...``, ``evaluation.*=...``, ``engine.*=...`` or ``data.root=...`` on top of the recipe.

    Raises:
        ValueError: an override of something that only a new training could change, or one that does not fit.
        FileNotFoundError: no such run, or it holds no trained model.
    """
    trained = find_run(name, Path(runs))
    for override in overrides:
        key = override.split("=")[0]
        if key.split(".")[0] not in ("threat", "evaluation", "engine") and key != "data.root":
            raise ValueError(
                f"{override!r} would change the training; an evaluation can change threat and evaluation"
            )
    experiment = apply_all(trained.experiment.model_dump(mode="json"), overrides)
    reporter = reporter or Reporter()
    run = Run(trained.path / "evaluations" / experiment.identity)
    if run.finished:
        reporter.stage(f"{run.path} is finished already")
        return run
    engine = experiment.engine.start(alone=True)
    model, splits = trained.model(), experiment.data.load()
    _rehearse_evaluation(experiment, model, splits.test)
    run.begin(experiment, engine.device)
    reporter.begin(run.path)
    _evaluate(run, experiment, model.to(engine.device), splits, reporter)
    return run


def evaluate_model(
    recipe: Mapping[str, Any],
    *overrides: str,
    runs: str | Path = "runs",
    again: bool = False,
    reporter: Reporter | None = None,
) -> Run:
    """Evaluate a model that no run trained, into a folder of its own in ``runs``.

    Args:
        recipe: ``data``, ``model`` with ``weights`` or ``package.module:factory``, ``threat``, ``evaluation``.
        overrides: ``key=value`` on top.
        again: throw away what is there and evaluate anew, for weights that changed under the same name.

    Raises:
        ValueError, OSError: the recipe, the data or the weights are at fault; nothing was written.
    """
    experiment = apply_all(copy.deepcopy(dict(recipe)), overrides)
    reporter = reporter or Reporter()
    run = Run(Path(runs) / experiment.identity)
    engine = experiment.engine.start(alone=True)
    splits = experiment.data.load()
    test = splits.test
    with torch.random.fork_rng():
        torch.manual_seed(mix_seed(experiment.seed))
        model = experiment.model.build(test.shape, len(test.classes)).eval()
    if device_of(model).type == "meta":
        raise ValueError("the model's weights are on the device meta, where they have no values: load them first")
    model = model.to(engine.device)
    own = fingerprint(model)
    if run.finished and not again:
        if run.fingerprint != own:
            raise ValueError(f"the weights are not those that {run.path} is about; --again evaluates them anew")
        reporter.stage(f"{run.path} is finished already")
        return run
    _rehearse_evaluation(experiment, model, test)
    if again:
        run.clear()
    run.begin(experiment, engine.device)
    write_text(run.path / "weights.txt", own)
    reporter.begin(run.path)
    _evaluate(run, experiment, model, splits, reporter)
    return run


def load(run: str | Path, *, runs: str | Path = "runs") -> nn.Module:
    """The trained model of a run, by its folder or its name in ``runs``, in eval mode on the CPU.

    Raises:
        FileNotFoundError: no such run, or it holds no trained model yet.
        ValueError: its files are damaged.
    """
    return find_run(run, Path(runs)).model()


def _rehearse(experiment: Experiment, model: nn.Module, images: Images, least: int) -> None:
    """Two examples through the objective, so that what cannot work fails before the work."""
    assert experiment.objective is not None
    x, y = experiment.training.prepare(*images.batch(slice(2)), len(images.classes), seed=0)
    with eval_mode(model), own_inputs(model):
        rehearse(model, x, len(images.classes))
        _rehearse_loss(experiment.objective, model, x, y, experiment.threat)
    aside = _Aside(model)
    model.train()
    with torch.random.fork_rng():
        rehearse(aside, x, len(images.classes))  # some answer otherwise in train mode: with auxiliary heads, say
    for one in experiment.analysis:
        one.rehearse(model, x, y, experiment.threat)
    if least < 2:
        try:
            with torch.random.fork_rng():
                aside(x[:1])
        except ValueError as fault:  # a BatchNorm without variance
            batch_size = experiment.training.batch_size
            raise ValueError(
                f"training.batch_size={batch_size} leaves a last batch of one image: {fault}"
            ) from fault


class _Aside(nn.Module):
    """A model whose buffers, such as the statistics of a BatchNorm, are not those that a forward pass changes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        logits: Tensor = functional_call(self.model, buffers, (x,))
        return logits


def _rehearse_loss(objective: Objective, model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> None:
    try:
        objective.loss(model, x, y, threat, Progress.end())
    except (RuntimeError, TypeError) as fault:
        raise ValueError(f"the objective {objective.name} cannot be computed for this model: {fault}") from fault


def _rehearse_evaluation(experiment: Experiment, model: nn.Module, test: Images) -> None:
    """The checks that the evaluation will make, and two examples through the certifiers."""
    x, y = test.batch(slice(256))
    check_inputs(x, y, experiment.threat)
    device = device_of(model)
    x, y = x[:2].to(device), y[:2].to(device)
    with frozen_eval(model):
        logits = rehearse(model, x, int(test.labels.max()) + 1)
        check_logits(logits, y)
    if logits.dtype != x.dtype:
        try:
            PGD(steps=1)(model, x, logits.argmax(1), experiment.threat)
        except (RuntimeError, TypeError) as fault:
            raise ValueError(
                f"the model's logits are {logits.dtype}, its inputs {x.dtype}: attacks cannot compare them; return "
                f"them as {x.dtype}"
            ) from fault
    for certifier in experiment.evaluation.certifiers:
        certifier(model, x, y, experiment.threat)


@contextlib.contextmanager
def _alarm_kept(run: Run, part: str) -> Iterator[None]:
    """Keeps the example that rings the soundness alarm, as ``alarm.npz``."""
    try:
        yield
    except SoundnessError as alarm:
        with whole_file(run.path / "alarm.npz") as temporary:
            np.savez(temporary, part=part, example=alarm.example, x=alarm.x.numpy(), x_adv=alarm.x_adv.numpy())
        message = f"in the {part} images, {alarm} (kept in {run.path / 'alarm.npz'})"
        raise SoundnessError(message, alarm.example, alarm.x, alarm.x_adv) from alarm


def _evaluate(
    run: Run, experiment: Experiment, model: nn.Module, splits: Splits, reporter: Reporter, seconds: float = 0.0
) -> None:
    """The last line: the sandwich on the test images, its curve, the training images beside it, and the result."""
    started = time.perf_counter()
    settings, threat = experiment.evaluation, experiment.threat
    images, labels = splits.test.batch(slice(settings.examples))
    with _alarm_kept(run, "test"):
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
            seed=experiment.seed,
            batch_size=settings.batch_size,
            on_progress=lambda name, standing, left: reporter.stage(
                (f"{name}: {standing} of {len(labels)} stand" if standing >= 0 else name)
                + (f", {left} left" if left else "")
            ),
            store=run.pieces,
        )
    run.write_examples(evaluation.table, evaluation.seconds)
    for name, (rows, x_adv) in evaluation.adversarial.items():
        run.write_adversarial(name, rows, x_adv, evaluation.table, settings.keep_adversarial)
    for warning in evaluation.summary["warnings"]:
        reporter.stage(f"warning: {warning}")
    _draw_adversarial(run, images, evaluation, threat)
    if settings.curve_points and threat.eps > 0:
        radii = sorted({*np.linspace(0, 2 * threat.eps, settings.curve_points + 1).tolist(), threat.eps})
        first = slice(settings.curve_examples)
        with _alarm_kept(run, "test"):
            curve = sandwich_curve(
                evaluation.subject,
                images[first],
                labels[first],
                threat,
                evaluation,
                settings.attacks,
                radii,
                seed=experiment.seed,
                batch_size=settings.batch_size,
            )
        count, guarantee = min(settings.curve_examples, len(labels)), evaluation.summary["bracket_guarantee"]
        figure = sandwich_figure(curve, threat, examples=count, guarantee=guarantee)
        save_figure(figure, run.path / "figures" / "sandwich", curve)
        reporter.stage(f"figure {run.path / 'figures' / 'sandwich.png'}")
    result: dict[str, Any] = {
        **evaluation.summary,
        **_on_training_images(run, experiment, model, splits.train, evaluation.subject is model, reporter),
        **({"certified_at": certified_at(evaluation.table, threat, settings.radii)} if settings.radii else {}),
        "seconds": seconds + time.perf_counter() - started,
        "peak_memory_bytes": peak_memory(),
    }
    write_json(run.path / "result.json", result)
    run.pieces.clear()


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
    images, labels = train.batch(slice(settings.train_examples))
    summary = evaluate(
        model,
        images,
        labels,
        experiment.threat,
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


def _draw_adversarial(run: Run, images: Tensor, evaluation: Evaluation, threat: Threat) -> None:
    """A contact sheet for each attack that found something."""
    table = evaluation.table
    for name, (rows, x_adv) in evaluation.adversarial.items():
        if images.dim() == 4 and images.shape[1] in (1, 3) and len(rows):
            first = rows[:8]
            figure = contact_sheet(images[first], x_adv[:8], table["label"].to_numpy()[first.numpy()], name, threat)
            frame = table.iloc[first.numpy()][["index", "label", f"{name}.distance", f"{name}.origin"]]
            save_figure(figure, run.path / "figures" / f"adversarial-{name}", frame)


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
