"""Objective: what every training loss takes and returns."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from holdfast.component import Component
from holdfast.inference import example_generators, mix_seed
from holdfast.threat import Threat


@dataclass(frozen=True)
class Progress:
    """Where a training stands: optimiser step ``step`` of ``total_steps``, counted from 0."""

    step: int
    total_steps: int
    seed: int = 0
    """With the step it determines everything that an objective draws."""
    offset: int = 0
    """Number of the first example within the whole batch, where several processes share it."""

    @property
    def fraction(self) -> float:
        """0 at the first step, towards 1 at the last."""
        return self.step / self.total_steps

    @classmethod
    def end(cls) -> Progress:
        """A finished training: every ramp has arrived."""
        return cls(1, 1)

    def generators(self, count: int) -> list[torch.Generator]:
        """One generator for each example of the step's batch."""
        return example_generators(mix_seed(self.seed, self.step), range(self.offset, self.offset + count))

    def random_points(self, x: Tensor, threat: Threat) -> Tensor:
        """A random point of the threat set around each input of the step's batch."""
        return threat.random_point(x, self.generators(len(x)))


def labels_only(y: Tensor) -> Tensor:
    """The labels; refuses probabilities, for losses that are defined by one class."""
    if y.is_floating_point():
        raise ValueError("this loss needs labels, not probabilities: no mixup and no label smoothing")
    return y


def repeated(y: Tensor, copies: int) -> Tensor:
    """Labels or probabilities of so many copies of a batch, one behind the other."""
    return y.repeat(copies, *[1] * (y.dim() - 1))


@dataclass(frozen=True)
class Loss:
    """The value to differentiate and what it consists of."""

    total: Tensor
    """Scalar, differentiable in the model's parameters."""
    parts: dict[str, Tensor]
    """Named detached scalars for the log."""
    x_adv: Tensor | None = None
    """The perturbed inputs that were trained on, (N, ...), or None."""


class Objective(Component, family="objectives"):
    """A loss over a batch: the mean of one value per example."""

    def initialise(self, model: nn.Module, seed: int) -> None:
        """Draw the weights that a training with this loss starts from; by default the model keeps its own."""

    @property
    def steps_per_batch(self) -> int:
        """Optimiser steps that are made with every batch."""
        return 1

    @abstractmethod
    def loss(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> Loss:
        """The loss of a batch.

        One forward pass is made in the model's own mode (and updates BatchNorm statistics in train mode);
        searches run in eval mode and leave no trace.

        Args:
            model: any module from inputs to logits.
            x: inputs in the threat's box, (N, ...).
            y: labels (N,), or class probabilities (N, K) where the objective can take them.
            progress: where the training stands, for ramps and random draws.
        """


class Perturbing(Objective):
    """A loss of inputs that a search perturbs first: the search, and the loss at what it found, each by itself."""

    @abstractmethod
    def perturbed(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> Tensor:
        """The inputs to train on, (N, ...); searched in eval mode, without a trace."""

    @abstractmethod
    def loss_at(
        self, model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, threat: Threat, progress: Progress
    ) -> Loss:
        """The loss at perturbed inputs: one forward pass in the model's own mode."""

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> Loss:
        x_adv = self.perturbed(model, x, y, threat, progress)
        return self.loss_at(model, x, y, x_adv, threat, progress)
