"""How long a training lasts and in what portions: the settings, and the plan that follows for a set of images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from holdfast.component import Settings
from holdfast.data.augmentation import Augmentation, probabilities
from holdfast.training.averaging import Averaging


class Group(NamedTuple):
    """The batches that make one optimiser step."""

    first: bool
    """Whether the batch is the first of them."""
    last: bool
    """Whether it is the last."""
    images: int
    """In all of them together."""
    step: int
    """Number of the optimiser step."""
    offset: int
    """Images of the batches before this one."""


@dataclass(frozen=True)
class Plan:
    """The batches of a training: ``total`` of them, so many in every epoch."""

    images: int
    batch_size: int
    accumulate: int
    total: int
    replays: int = 1
    """Steps in a row that are made with every batch."""

    @property
    def per_epoch(self) -> int:
        return math.ceil(self.images / self.batch_size) * self.replays

    @property
    def epochs(self) -> int:
        """The last may be cut short."""
        return math.ceil(self.total / self.per_epoch)

    def of_epoch(self, epoch: int) -> int:
        """Batches of this epoch."""
        return min(self.per_epoch, self.total - epoch * self.per_epoch)

    @property
    def smallest_batch(self) -> int:
        """Images of the smallest batch."""
        return (self.images - 1) % self.batch_size + 1 if self.total >= self.per_epoch else self.batch_size

    @property
    def steps(self) -> int:
        """Optimiser steps of the training: one for each group of accumulated batches."""
        epochs, rest = divmod(self.total, self.per_epoch)
        return epochs * math.ceil(self.per_epoch / self.accumulate) + math.ceil(rest / self.accumulate)

    def group(self, number: int) -> Group:
        """The batches of an optimiser step, as seen from one of them, by its number in the training."""
        epoch, batch = divmod(number, self.per_epoch)
        if self.replays > 1:
            first = batch // self.replays
            images = min((first + 1) * self.batch_size, self.images) - first * self.batch_size
            return Group(True, True, images, number, 0)
        first = batch - batch % self.accumulate
        stop = min(first + self.accumulate, self.of_epoch(epoch))
        images = min(stop * self.batch_size, self.images) - first * self.batch_size
        step = epoch * math.ceil(self.per_epoch / self.accumulate) + batch // self.accumulate
        return Group(batch == first, batch + 1 == stop, images, step, (batch - first) * self.batch_size)


class Training(Settings):
    """How long and in what portions."""

    epochs: PositiveInt = 20
    """Passes over the training images."""
    steps: PositiveInt | None = None
    """Train for so many batches in place of a number of epochs."""
    presentations: PositiveInt | None = None
    """Train on about so many images, repetitions counted, in place of a number of epochs: the same work for
    every ``train_size``."""
    minutes: PositiveFloat | None = None
    """Stop once the training itself has taken so long. Ramps and schedules are still laid out for the whole;
    where time runs out decides the weights, so they are no longer the seed's alone."""
    batch_size: PositiveInt = 128
    """Images per batch, over all devices; the last batch of an epoch may be smaller."""
    augmentations: list[Augmentation] = []
    """Random changes of the training images, in the order in which they apply."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Probability that is spread evenly over all classes."""
    accumulate: PositiveInt = 1
    """Batches that make one optimiser step, which is that of one large batch of all their images: its gradient is
    the mean over them, and schedules and ramps go by such steps."""
    clip_gradient: PositiveFloat | None = None
    """Largest l_2 norm of the gradient of a step."""
    l1: NonNegativeFloat = 0.0
    """Weight of Σ |w| over the weights of dense and convolutional layers, added to the loss."""
    reestimate_batch_norm: bool = False
    """After every epoch take BatchNorm's statistics anew: plain means over an epoch of what the loss lets the model
    read in its own mode, which of certified losses are the clean images. Running averages by default."""
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
    checkpoint_every: PositiveInt | None = None
    """Batches between checkpoints inside an epoch, for long epochs; there is one after
    every validated epoch anyway, or every few seconds."""

    keep_every: PositiveInt | None = None
    """Keep the weights of every so many epochs in the run folder, for analyses afterwards; none by default."""

    @model_validator(mode="after")
    def _make_sense_together(self) -> Self:
        if self.patience and not self.watch:
            raise ValueError("patience needs watch: which accuracy shall grow?")
        if self.steps and self.presentations:
            raise ValueError("steps and presentations are two budgets: give one of them")
        return self

    def plan(self, images: int, replays: int = 1) -> Plan:
        """How the work on an epoch of so many images divides into batches, each of them taken so many times."""
        if replays > 1 and self.accumulate > 1:
            raise ValueError(
                f"training.accumulate={self.accumulate} gathers batches, the objective replays each {replays} times"
            )
        per_epoch = math.ceil(images / self.batch_size) * replays
        total = self.steps or self.epochs * per_epoch
        if self.presentations:
            total = max(1, round(self.presentations / images * per_epoch))
        return Plan(images, self.batch_size, self.accumulate, total, replays)

    def prepare(self, x: Tensor, y: Tensor, classes: int, seed: int) -> tuple[Tensor, Tensor]:
        """Images augmented, and their labels: probabilities if they are mixed or smoothed."""
        generator = torch.Generator().manual_seed(seed)
        for augmentation in self.augmentations:
            x, y = augmentation(x, y, generator)
        if y.is_floating_point() and y.shape[1] != classes:
            raise ValueError(f"mixup.num_classes={y.shape[1]}, but the data have {classes} classes")
        if self.label_smoothing:
            y = (1 - self.label_smoothing) * probabilities(y, classes) + self.label_smoothing / classes
        return x, y
