"""The training loop: batches, optimiser steps, a validation after each epoch, a checkpoint to go on from."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import astuple
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.data import Images
from holdfast.inference import mix_seed
from holdfast.listeners import Observer, Reporter
from holdfast.objectives import Objective, Progress
from holdfast.threat import Threat
from holdfast.training.averaging import Forward, WeightAverage, estimate_batch_norm
from holdfast.training.checkpoint import Checkpoint
from holdfast.training.engine import RunningEngine
from holdfast.training.optimizers import Optimizer, set_rate
from holdfast.training.plan import Training
from holdfast.training.schedules import Schedule
from holdfast.training.step import Finite, Tally, TrainingStep
from holdfast.training.stretches import by_process, stretch

MOST_SECONDS_UNSAVED = 5
"""Between checkpoints at the ends of epochs; every one that is validated has its own."""
STATISTICS_BATCHES = 50
"""For BatchNorm's statistics of averaged weights, at each validation and at the end, and at most an epoch: a search
costs each of them as much as a step. The running average of a BatchNorm in training weighs about 20 batches."""


class TrainingDiverged(ArithmeticError):
    """The loss became NaN or inf; the last checkpoint is from before."""


class _Best:
    """The weights of the best validation so far, and how long ago that was."""

    def __init__(self, training: Training, state: dict[str, Any]) -> None:
        self.training, self.state = training, state

    @property
    def stops(self) -> bool:
        patience = self.training.patience
        return bool(patience and self.state and self.state["waited"] >= patience)

    def offer(self, model: nn.Module, record: dict[str, Any]) -> None:
        """Consider the weights that were validated."""
        if not self.training.watch:
            return
        name = f"validation_{self.training.watch}"
        if name not in record:
            raise ValueError(f"training.watch={self.training.watch}, but the validation does not compute it")
        if self.state and record[name] <= self.state["value"]:
            self.state = {**self.state, "waited": self.state["waited"] + 1}
        else:
            copy = {key: value.clone() for key, value in model.state_dict().items()}
            self.state = {"value": record[name], "waited": 0, "epoch": record["epoch"], "model": copy}


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Operators that add in a fixed order, where torch has them; a warning where it has not."""
    memory: Any = torch.utils.deterministic
    enabled, warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn)
        memory.fill_uninitialized_memory = fill


def fit(
    model: nn.Module,
    images: Images,
    objective: Objective,
    threat: Threat,
    optimizer: Optimizer,
    schedule: Schedule,
    training: Training,
    engine: RunningEngine,
    *,
    seed: int = 0,
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
    resume: Checkpoint | None = None,
    save: Callable[[Checkpoint], None] | None = None,
    observers: Sequence[Observer] = (),
    reporter: Reporter | None = None,
) -> list[dict[str, Any]]:
    """Train the model in place, and return one record per epoch.

    All randomness follows from (seed, epoch, step): a training resumed from its checkpoint ends in the
    same weights, bit for bit, as one that was never stopped. Where several processes train, each makes the
    gradient of its share of every batch, and the objective draws for each image what one process would. What
    BatchNorm sees, what augmentation and Dropout draw, and which images mixup pairs then depends on their number.

    Args:
        validate: accuracies of the model for the history; called in between by the leading process, never
            used for the training.
        resume: go on from this state.
        save: given the state after every epoch by the leading process, to write before the next step changes it.
        observers: told of every batch.

    Raises:
        TrainingDiverged: the loss is not finite.
    """
    model.train()
    if resume is None:
        objective.initialise(model, seed)
    with torch.random.fork_rng(), _deterministic():
        fitting = _Fitting(model, images, objective, threat, optimizer, schedule, training, engine, seed, observers)
        if resume is not None:
            fitting.load(resume)
        history = fitting.run(validate, save, reporter or Reporter())
    model.eval()
    return history


class _Fitting:
    """One call of ``fit``: what changes while it runs."""

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        objective: Objective,
        threat: Threat,
        optimizer: Optimizer,
        schedule: Schedule,
        training: Training,
        engine: RunningEngine,
        seed: int,
        observers: Sequence[Observer],
    ) -> None:
        self.observers, self.objective, self.threat = observers, objective, threat
        self.model, self.images = model, images.to(engine.device)
        self.settings, self.schedule, self.training = optimizer, schedule, training
        self.engine, self.seed = engine, seed
        step_module = TrainingStep(model.to(engine.device), objective, threat, training.l1)
        self.carried, self.finite = step_module.carried, Finite(engine)
        self.step_module, self.optimizer = engine.prepare(step_module, optimizer.build(model))
        self.average = WeightAverage(training.averaging, model) if training.averaging else None
        self.best = _Best(training, {})
        self.plan = training.plan(images.epoch_size, objective.steps_per_batch)
        self.history: list[dict[str, Any]] = []
        self.stretches: list[dict[str, Any]] = []
        self.step = self.saved = 0
        self.saved_at = 0.0
        self.perturbs = False  # whether the objective trains on perturbed inputs
        self.tally, self.seconds = Tally({}), 0.0  # of the epoch under way
        self.seen: list[list[dict[str, Any]]] = []  # of it, by each observer of every process, before a cut

    def load(self, checkpoint: Checkpoint) -> None:
        self.model.load_state_dict(checkpoint.model)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.engine.load(checkpoint.precision)
        self.carried.load(checkpoint.carried)
        if self.average:
            self.average.load(checkpoint.average)
        self.best = _Best(self.training, checkpoint.best)
        self.history, self.step, self.saved = list(checkpoint.history), checkpoint.step, checkpoint.step
        self.stretches = list(checkpoint.stretches)
        if checkpoint.partial:
            self.seconds = checkpoint.partial["seconds"]
            if self.engine.leads:  # the sums are those of all processes together
                self.tally = Tally(checkpoint.partial["sums"])
                self.seen = checkpoint.partial.get("observers", [])

    def checkpoint(self, **partial: Any) -> Checkpoint:
        states = self.model.state_dict(), self.optimizer.state_dict(), self.history
        average = self.average.state() if self.average else {}
        rest = self.engine.state(), self.stretches, self.carried.state()
        return Checkpoint(*states, average, self.best.state, self.step, partial, *rest)

    @property
    def ended(self) -> bool:
        """Whether the budget is used up, or no better validation came for too long."""
        out_of_time = bool(self.history) and "out_of_time" in self.history[-1]
        return self.step >= self.plan.total or out_of_time or self.best.stops

    def run(
        self,
        validate: Callable[[nn.Module], dict[str, float]] | None,
        save: Callable[[Checkpoint], None] | None,
        reporter: Reporter,
    ) -> list[dict[str, Any]]:
        engine = self.engine
        reporter.train(self.plan.total, self.plan.per_epoch, self.step)
        validates = engine.of_first(validate is not None)
        divided = by_process(self.model, self.objective, self.training)
        self.stretches = [*self.stretches, stretch(len(self.stretches) + 1, self.step, engine, divided)]
        while not engine.of_first(self.ended):
            epoch = self.step // self.plan.per_epoch + 1
            record = {"epoch": epoch, **self.train_epoch(save, reporter)}
            due = epoch % self.training.validate_every == 0 or epoch == self.plan.epochs or "out_of_time" in record
            if validates and due:
                started = time.perf_counter()
                with self.averaged():  # all processes estimate its statistics, the first validates
                    if validate and engine.leads:
                        record |= validate(self.model)
                        if self.perturbs and (text := _catastrophic_overfitting(self.history, record)):
                            reporter.stage(f"warning: {text}")
                        self.best.offer(self.model, record)
                record["seconds"] += time.perf_counter() - started
            self.history.append(engine.of_first(record))
            self.tally, self.seconds, self.saved = Tally({}), 0.0, self.step
            kept = self.training.keep_every and epoch % self.training.keep_every == 0
            late = time.monotonic() - self.saved_at > MOST_SECONDS_UNSAVED
            if save and engine.leads and (due or kept or late or self.ended):
                save(self.checkpoint())
                self.saved_at = time.monotonic()
            reporter.epoch(record)
        if engine.of_first(bool(self.best.state)):
            if engine.leads:
                self.model.load_state_dict(self.best.state["model"])
        elif self.average:
            self.average.apply(self.model, self.estimate)
        if engine.processes > 1:
            self.model.load_state_dict(engine.of_first(self.model.state_dict()))
        return self.history

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """The model with the weights it would end with now."""
        if self.average is None:
            return nullcontext()
        return self.average.in_place(self.model, self.estimate)

    def estimate(self, model: nn.Module) -> None:
        """BatchNorm statistics on what the objective trains on now: augmented, noisy, attacked images."""
        estimate_batch_norm(model, self.forwards(STATISTICS_BATCHES), self.engine.sum)

    def forwards(self, most: int | None = None) -> Iterator[Forward]:
        """What training makes of the first batches of an epoch, at the place that it has reached."""
        training, engine, plan = self.training, self.engine, self.plan
        step = max(plan.group(self.step - 1).step, 0)
        size = max(training.batch_size, 2 * engine.processes)
        batches = self.images.order(0, self.seed).split(size)[:most]
        # A share of one image has no variance; all processes leave its batch out, as SyncBatchNorm waits for each.
        batches = [batch for batch in batches if len(batch) // engine.processes > 1]
        stream = self.images.stream([_own(batch, engine) for batch in batches])
        for number, (batch, (x, y)) in enumerate(zip(batches, stream, strict=True)):
            first, seed = engine.share(len(batch)).start, mix_seed(self.seed, number, 15)
            engine.seed(mix_seed(seed, 3, first))
            x, y = training.prepare(x, y, len(self.images.classes), mix_seed(seed, 2, first))
            progress = Progress(step - step % plan.replays, plan.steps, seed, first, len(batch))
            yield partial(self.objective.present, x=x, y=y, threat=self.threat, progress=progress)

    def train_epoch(self, save: Callable[[Checkpoint], None] | None, reporter: Reporter) -> dict[str, Any]:
        """The rest of the epoch under way, and its record."""
        plan, training, engine = self.plan, self.training, self.engine
        epoch, number = divmod(self.step, plan.per_epoch)
        trained = sum(record["train_seconds"] for record in self.history)
        started = time.perf_counter() - self.seconds
        once = self.images.order(epoch, self.seed).split(training.batch_size)
        batches = [batch for batch in once for _ in range(plan.replays)][number : plan.of_epoch(epoch)]
        own = [_own(indices, engine) for indices in batches]
        record: dict[str, Any] = {}
        for observer, seen in zip(self.observers, self.seen or [[]] * len(self.observers), strict=True):
            observer.begin(epoch + 1, seen)
        self.seen = []
        self.model.train()
        for done, (batch, (x, y)) in enumerate(zip(batches, self.images.stream(own), strict=True), start=1):
            share, group = engine.share(len(batch)), plan.group(self.step)
            place = group.step, plan.steps, self.seed, group.offset + share.start, group.images
            progress = Progress(*place, engine.processes, len(share) / len(batch))
            engine.seed(mix_seed(self.seed, self.step, 3, share.start))  # for Dropout and the like
            first = self.step - self.step % plan.replays  # every replay sees the same augmented images
            x, y = training.prepare(x, y, len(self.images.classes), mix_seed(self.seed, first, 2, share.start))
            loss, x_adv = self.train_step(x, y, progress, len(share))
            self.perturbs = x_adv is not None
            for observer in self.observers if len(share) else ():
                observer.observe(x, y, x_adv, progress.alone)
            reporter.step(loss)
            self.step += 1
            self.seconds = time.perf_counter() - started
            if not group.last:
                continue
            if training.minutes and engine.of_first(trained + self.seconds >= 60 * training.minutes):
                record["out_of_time"] = True
                break
            # The same for all processes; the end of an epoch has its own checkpoint, with the validation.
            due = training.checkpoint_every and self.step - self.saved >= training.checkpoint_every
            due = due and self.step % plan.replays == 0  # what moves from replay to replay is in no checkpoint
            if save and due and number + done < plan.of_epoch(epoch):
                self.stop_unless_finite(self.finite.ask())
                self.saved = self.step
                sums, states = self.tally.over_processes(engine), self.seen_by_all()
                if engine.leads:
                    save(self.checkpoint(sums=sums, seconds=self.seconds, observers=states))
        self.stop_unless_finite(self.finite.ask())
        record |= {"step": self.step, "lr": self.settings.lr * self.schedule.factor(progress.step, plan.steps)}
        for name, (total, count) in self.tally.over_processes(engine).items():
            record[name] = (total / count).item()
        for observer, seen in zip(self.observers, self.seen_by_all(), strict=True):
            if engine.leads:
                observer.begin(epoch + 1, seen)
                record |= observer.record()
        if training.reestimate_batch_norm:
            estimate_batch_norm(self.model, self.forwards(), engine.sum)
            self.seconds = time.perf_counter() - started
        return record | {"train_seconds": self.seconds, "seconds": time.perf_counter() - started}

    def seen_by_all(self) -> list[list[dict[str, Any]]]:
        """Of each observer the states in all processes."""
        return [self.engine.gathered(observer.state()) for observer in self.observers]

    def stop_unless_finite(self, found: tuple[int, float] | None) -> None:
        if found is None:
            return
        step, loss = found
        epoch, number = divmod(step, self.plan.per_epoch)
        batches = self.images.order(epoch, self.seed).split(self.training.batch_size)
        raise TrainingDiverged(
            f"the loss is {loss} at epoch {epoch + 1}, step {number + 1} of {self.plan.of_epoch(epoch)}; the batch "
            f"was training images {batches[number // self.plan.replays].tolist()}"
        )

    def train_step(self, x: Tensor, y: Tensor, progress: Progress, count: int) -> tuple[Tensor, Tensor | None]:
        """One batch; its gradient, and with the last batch of its group the optimiser's step."""
        engine, group = self.engine, self.plan.group(self.step)
        with nullcontext() if group.last else engine.accumulating(self.step_module):
            try:
                loss, parts, x_adv = self.step_module(x, y, *astuple(progress))
            except Exception:  # of weights that are NaN since a step that nobody has asked about
                self.stop_unless_finite(self.finite.ask(here=True))
                raise
            self.stop_unless_finite(self.finite.note(loss, self.step))
            if group.first:
                self.optimizer.zero_grad()
            # The processes' gradients are averaged; together they are to be the mean over the group's images.
            engine.backward(loss * (count * engine.processes / group.images))
        if group.last:
            factor = self.schedule.factor(progress.step, progress.total_steps)
            momentum = self.schedule.momentum(progress.step, progress.total_steps)
            set_rate(self.optimizer, self.settings.lr * factor, momentum)
            if self.training.clip_gradient:
                engine.clip(self.step_module, self.optimizer, self.training.clip_gradient)
            self.optimizer.step()
            if self.average:
                self.average.update(self.model, progress.fraction)
        self.tally.add({"loss": loss.detach(), **parts}, count)
        return loss, x_adv


def _catastrophic_overfitting(history: list[dict[str, Any]], record: dict[str, Any]) -> str | None:
    """Words of warning where training on perturbed inputs has lost the robustness it had, but not the accuracy:
    catastrophic overfitting (Wong et al., 2020), which single-step training is prone to."""
    earlier = [one for one in history if "validation_attacked" in one]
    if not earlier or not {"validation_attacked", "validation_standard"} <= record.keys():
        return None
    best = max(earlier, key=lambda one: one["validation_attacked"])
    before, now = best["validation_attacked"], record["validation_attacked"]
    fell = before > 0.1 and now < before / 2
    if not fell or record["validation_standard"] < best["validation_standard"] - 0.02:
        return None
    return (
        f"catastrophic overfitting: robust accuracy under PGD fell from {100 * before:.1f} % in epoch "
        f"{best['epoch']} to {100 * now:.1f} %, standard accuracy did not"
    )


def _own(indices: Tensor, engine: RunningEngine) -> Tensor:
    """This process's examples of a batch; one example, of no weight, where the batch is too small for all."""
    share = engine.share(len(indices))
    return indices[share.start : max(share.stop, share.start + 1)]
