"""The training loop: epochs of batches, a validation after each, a checkpoint to go on from."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from holdfast.component import Settings
from holdfast.data import Images
from holdfast.data.augmentation import Augmentation, probabilities
from holdfast.inference import mix_seed
from holdfast.objectives import Objective, Progress
from holdfast.threat import Threat
from holdfast.training.averaging import Averaging, WeightAverage
from holdfast.training.checkpoint import Checkpoint
from holdfast.training.engine import RunningEngine
from holdfast.training.optimizers import Optimizer, set_rate
from holdfast.training.schedules import Schedule


class Training(Settings):
    """How long and in what portions."""

    epochs: PositiveInt = 20
    """Passes over the training images."""
    presentations: PositiveInt | None = None
    """Train on about so many images, repetitions counted, in place of a number of epochs: the same work for
    every ``train_size``."""
    batch_size: PositiveInt = 128
    """Images per batch; the last batch of an epoch may be smaller."""
    augmentations: list[Augmentation] = []
    """Random changes of the training images, in the order in which they apply."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Probability that is spread evenly over all classes."""
    accumulate: PositiveInt = 1
    """Batches that make one optimiser step: its gradient is the mean over all their images."""
    clip_gradient: PositiveFloat | None = None
    """Largest l_2 norm of the gradient of a step."""
    averaging: Averaging | None = None
    """Average the weights along the training and go on with the average; none by default."""
    validate_every: PositiveInt = 1
    """Epochs between validations; the last epoch is always validated."""
    validation_examples: PositiveInt = 500
    """Validate on at most so many images."""
    watch: Literal["standard", "attacked", "certified"] | None = None
    """Keep the weights of the best validation by this accuracy (the earliest of equals); the last by default."""
    patience: PositiveInt | None = None
    """Stop after so many validations in a row without a better one; needs ``watch``."""

    @model_validator(mode="after")
    def _patience_needs_watch(self) -> Self:
        if self.patience and not self.watch:
            raise ValueError("patience needs watch: which accuracy shall grow?")
        return self

    def passes(self, images: int) -> int:
        """Epochs over so many training images."""
        return max(1, round(self.presentations / images)) if self.presentations else self.epochs

    def images_of_step(self, number: int, images: int) -> int:
        """How many images make the optimiser step that batch ``number`` of an epoch belongs to."""
        first = number // self.accumulate * self.accumulate
        return min((first + self.accumulate) * self.batch_size, images) - first * self.batch_size

    def prepare(self, images: Images, indices: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """The images of these numbers, augmented, and their labels: probabilities if they are mixed or smoothed."""
        x, y = images.batch(indices)
        generator = torch.Generator().manual_seed(seed)
        for augmentation in self.augmentations:
            x, y = augmentation(x, y, generator)
        if self.label_smoothing:
            classes = len(images.classes)
            y = (1 - self.label_smoothing) * probabilities(y, classes) + self.label_smoothing / classes
        return x, y


class TrainingDiverged(ArithmeticError):
    """The loss became NaN or inf; the last checkpoint is from before."""


class Reporter:
    """Told how a training gets on. This one keeps quiet."""

    def begin(self, folder: Path) -> None:
        """A run starts (or goes on) and keeps its state in this folder."""

    def train(self, epochs: int, steps: int, finished: int) -> None:
        """Training starts: so many epochs of so many steps, of which some are finished already."""

    def step(self, loss: Tensor) -> None:
        """A step was made."""

    def epoch(self, record: dict[str, Any]) -> None:
        """An epoch was finished; the record is its line in the history."""

    def stage(self, text: str) -> None:
        """Something else begins or was found."""


class Observer(Protocol):
    """Sees every batch that is trained on, such as a meter of neural collapse."""

    def observe(self, x: Tensor, y: Tensor, x_adv: Tensor | None, progress: Progress) -> None:
        """The clean inputs, their labels, what the objective perturbed them to, and when; after the step."""


class _TrainingStep(nn.Module):
    """One forward: the loss of one batch. A module, so that the engine can wrap all of it at once."""

    def __init__(self, model: nn.Module, objective: Objective, threat: Threat) -> None:
        super().__init__()
        self.model, self.objective, self.threat = model, objective, threat

    def forward(
        self, x: Tensor, y: Tensor, step: int, total: int, seed: int
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        loss = self.objective.loss(self.model, x, y, self.threat, Progress(step, total, seed))
        return loss.total, loss.parts, loss.x_adv


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
    same weights, bit for bit, as one that was never stopped.

    Args:
        validate: accuracies of the model for the history; called in between, never used for the training.
        resume: go on from this state.
        save: given the state after every epoch, to write before the next step changes it.
        observers: told of every batch.

    Raises:
        TrainingDiverged: the loss is not finite.
    """
    reporter = reporter or Reporter()
    images = images.to(engine.device)
    torch_optimizer = optimizer.build(model)
    step_module, torch_optimizer = engine.prepare(_TrainingStep(model, objective, threat), torch_optimizer)
    average = WeightAverage(training.averaging, model) if training.averaging else None
    history: list[dict[str, Any]] = []
    if resume is not None:
        model.load_state_dict(resume.model)
        torch_optimizer.load_state_dict(resume.optimizer)
        history = list(resume.history)
        if average:
            average.load(resume.average)

    best = _Best(training, resume.best if resume else {})
    epochs, steps = training.passes(len(images)), math.ceil(len(images) / training.batch_size)
    total = epochs * steps
    reporter.train(epochs, steps, len(history))
    with torch.random.fork_rng(), _deterministic():
        for epoch in range(len(history), epochs):
            if best.stops:
                break
            started = time.perf_counter()
            torch.manual_seed(mix_seed(seed, epoch))  # for Dropout and the like
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(mix_seed(seed, epoch, 1)))
            model.train()
            sums: dict[str, Tensor] = {}
            counts: dict[str, int] = {}  # a part may be absent from some steps
            for number, indices in enumerate(order.split(training.batch_size)):
                step = epoch * steps + number
                x, y = training.prepare(images, indices, mix_seed(seed, step, 2))
                loss, parts, x_adv = step_module(x, y, step, total, seed)
                if not torch.isfinite(loss):
                    raise TrainingDiverged(
                        f"the loss is {loss.item()} at epoch {epoch + 1}, step {number + 1} of {steps} "
                        f"(training images {indices[:8].tolist()} …)"
                    )
                first = number % training.accumulate == 0
                last = (number + 1) % training.accumulate == 0 or number + 1 == steps
                if first:
                    torch_optimizer.zero_grad()
                engine.backward(loss * len(indices) / training.images_of_step(number, len(images)))
                if last:
                    lr = optimizer.lr * schedule.factor(step, total)
                    set_rate(torch_optimizer, lr, schedule.momentum(step, total))
                    if training.clip_gradient:
                        nn.utils.clip_grad_norm_(model.parameters(), training.clip_gradient)
                    torch_optimizer.step()
                    if average:
                        average.update(model, step / total)
                for observer in observers:
                    observer.observe(x, y, x_adv, Progress(step, total, seed))
                reporter.step(loss)
                for name, value in {"loss": loss.detach(), **parts}.items():
                    sums[name] = sums.get(name, torch.zeros_like(value)) + value * len(indices)
                    counts[name] = counts.get(name, 0) + len(indices)
            record: dict[str, Any] = {"epoch": epoch + 1, "step": (epoch + 1) * steps, "lr": lr}
            record |= {name: value.item() / counts[name] for name, value in sums.items()}
            record["train_seconds"] = time.perf_counter() - started
            if validate and ((epoch + 1) % training.validate_every == 0 or epoch + 1 == epochs):
                averaged = average.in_place(model, images, training.batch_size) if average else nullcontext()
                with averaged:
                    record |= validate(model)
                    best.offer(model, record)
            record["seconds"] = time.perf_counter() - started
            history.append(record)
            if save:
                states = model.state_dict(), torch_optimizer.state_dict(), history
                save(Checkpoint(*states, average.state() if average else {}, best.state))
            reporter.epoch(record)
        if best.state:
            model.load_state_dict(best.state["model"])
        elif average:
            average.apply(model, images, training.batch_size)
    model.eval()
    return history
