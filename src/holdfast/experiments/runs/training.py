"""Training one experiment, and evaluating what comes of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from holdfast.attacks import PGD
from holdfast.certify import Certifier
from holdfast.data import Images, Splits, drawn
from holdfast.evaluation import evaluate
from holdfast.experiments.recipes.experiment import Experiment
from holdfast.experiments.recipes.overrides import resolve
from holdfast.experiments.recipes.sparse import plain
from holdfast.experiments.runs.evaluation import evaluate_into, rehearse_evaluation, tell_imports, test_images
from holdfast.experiments.runs.folder import Run, find_run
from holdfast.experiments.runs.reported import alarm_kept, already, finished_as_asked
from holdfast.experiments.runs.tracking import TrackedReporter, Tracker, trackers
from holdfast.inference import eval_mode, mix_seed, own_inputs, rehearse
from holdfast.objectives import Objective, Progress
from holdfast.threat import Threat
from holdfast.training import Observer, Reporter, fit
from holdfast.training.checkpoint import Checkpoint
from holdfast.training.stretches import by_process

VALIDATION_ATTACK = PGD(steps=10)
"""The attack of the progress line; the evaluation's own attacks are for the last line."""
UNSEEN = ("keep_every", "validate_every", "validation_examples")
"""Settings of the training that change no weights, but what is kept and measured on the way."""


def train(
    recipe: str | Path | Experiment,
    *overrides: str,
    runs: str | Path = "runs",
    again: bool = False,
    reporter: Reporter | None = None,
    track: Sequence[str | Tracker] = (),
) -> Run:
    """Train and evaluate one experiment: ``train("digits", "objective.kappa=0.3")``.

    What is trained is not trained again, and what is evaluated not evaluated again: other attacks, certifiers or
    images are another evaluation of the weights that are there; another curve, or more adversarial images to keep,
    are made from the evaluation that is there. What was cut off goes on from its last checkpoint and ends in the
    same result. With ``engine.devices`` above 1 this program is started once more for every further device, from
    its beginning; all take part in the training, and the first alone evaluates and writes.

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
    if experiment.objective is None:
        raise ValueError("the recipe has no objective: there is nothing to train")
    tell_imports(experiment, reporter)
    run = Run(Path(runs) / experiment.identity)
    evaluation = run.evaluation(experiment)
    # What was not measured while it trained takes another training.
    unseen = run.trained and [
        one for one in plain(experiment.analysis) if one not in run.recipe.get("analysis", [])
    ]
    fits = bool(again or not run.trained or unseen)
    if not fits:
        reporter.stage(f"{run.path} is trained already{_too_late(run, experiment)}")
        if not leads:
            return Run(run.path, evaluation.path.name)
        if finished_as_asked(evaluation, experiment):
            reporter.stage(already(evaluation, experiment.evaluation))
            return Run(run.path, evaluation.path.name)
    splits = experiment.data.load()
    reporter.stage(experiment.data.told(splits))
    if fits:
        model = _fit(run, experiment, splits, again, leads, reporter, followers)
    else:
        model = run.model()
        for tracker in followers:
            tracker.begin(run.path, experiment.model_dump(mode="json"))
    if leads and not finished_as_asked(evaluation, experiment):
        evaluate_into(evaluation, experiment, model, splits, reporter)
    for tracker in followers:
        tracker.end(evaluation.result)
    return Run(run.path, evaluation.path.name)


def _too_late(run: Run, experiment: Experiment) -> str:
    """In words what is asked for by name that only a new training could keep or measure."""
    asked, there = experiment.training, run.experiment.training
    names = [name for name in UNSEEN if name in asked.model_fields_set]
    other = [
        f"training.{name}={getattr(asked, name)}" for name in names if getattr(asked, name) != getattr(there, name)
    ]
    return f", without {' and '.join(other)}: that needs --again" if other else ""


def _fit(
    run: Run,
    experiment: Experiment,
    splits: Splits,
    again: bool,
    leads: bool,
    reporter: Reporter,
    followers: Sequence[Tracker],
) -> nn.Module:
    """Train into the run's folder, from its checkpoint on where there is one."""
    assert experiment.objective is not None
    engine = experiment.engine.start()
    shape, num_classes = splits.train.shape, len(splits.train.classes)
    with torch.random.fork_rng():
        torch.manual_seed(mix_seed(experiment.seed))
        model = experiment.model.build(shape, num_classes)
    checkpoint = None if again or run.trained else run.read_checkpoint(model, engine.device)
    plan = experiment.training.plan(splits.train.epoch_size, experiment.objective.steps_per_batch)
    least = plan.smallest_batch // engine.processes
    _rehearse(experiment, model, splits.validation, least)
    if experiment.training.watch == "certified" and not experiment.evaluation.certifiers:
        raise ValueError("training.watch=certified needs one of evaluation.certifiers")
    rehearse_evaluation(experiment, model, test_images(experiment, splits, reporter))
    certifiers = _rehearsed_in_training(experiment, model, splits.validation)
    with run.claimed() if leads else contextlib.nullcontext():
        if leads:
            if again:
                run.clear()
            run.begin(experiment.training_recipe(), experiment.model_dump(mode="json"), engine.device)
            reporter.begin(run.path)
            divided = by_process(model, experiment.objective, experiment.training)
            for words in _told_of_processes(checkpoint, engine.processes, divided):
                reporter.stage(words)
            for tracker in followers:
                tracker.begin(run.path, experiment.model_dump(mode="json"))
        engine.launch()
        chosen = drawn(
            splits.validation.labels, experiment.training.validation_examples, experiment.evaluation.draw
        )
        images, labels = splits.validation.batch(chosen)

        def validate(model: nn.Module) -> dict[str, float]:
            summary = evaluate(
                model, images, labels, experiment.threat, [VALIDATION_ATTACK], certifiers, seed=experiment.seed
            ).summary
            accuracies = {"standard": summary["standard"], **summary["bracket"]}
            return {f"validation_{name}": value for name, value in accuracies.items() if value is not None}

        with alarm_kept(run, "validation"):
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
            for one in experiment.analysis:
                if (table := one.table(history)) is not None:
                    run.write_table(one.name, table)
            run.end_training()
            run.write_model(model, shape, num_classes)
        engine.wait()
        return model


def _told_of_processes(checkpoint: Checkpoint | None, processes: int, divided: list[str]) -> Iterator[str]:
    """What their number changes, where several train or another number went before."""
    earlier = [one["processes"] for one in checkpoint.stretches] if checkpoint else []
    if earlier and earlier[-1] != processes:
        yield f"goes on with {processes} process{'es' * (processes > 1)} where {earlier[-1]} trained so far"
    if divided and max(processes, *earlier, 1) > 1:
        yield f"warning: {', '.join(divided)} by process: the numbers depend on how many processes train"


def _observers(experiment: Experiment, model: nn.Module) -> list[Observer]:
    """What the recipe has measured while the model trains."""
    assert experiment.objective is not None

    def rate(progress: Progress) -> float:
        return experiment.optimizer.lr * experiment.schedule.factor(progress.step, progress.total_steps)

    watches = [one.watch(model, experiment.objective, experiment.threat, rate) for one in experiment.analysis]
    return [watch for watch in watches if watch is not None]


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


def _rehearsed_in_training(experiment: Experiment, model: nn.Module, images: Images) -> list[Certifier]:
    """What validation asks: what answers in the place of the evaluation's certifiers, each once. What the
    evaluation's rehearsal has not asked about is tried on two examples."""
    asked, certifiers = experiment.evaluation.certifiers, list[Certifier]()
    for one in (certifier.in_training for certifier in asked):
        certifiers += [] if one in certifiers else [one]
    known = [one.brief for one in asked] if experiment.threat == experiment.test_threat else []
    for one in certifiers:
        if one.brief not in known:
            one.brief(model, *images.batch(slice(2)), experiment.threat)
    return certifiers


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
    except (RuntimeError, TypeError, ImportError) as fault:
        raise ValueError(f"the objective {objective.name} cannot be computed for this model: {fault}") from fault
