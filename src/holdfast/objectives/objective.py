"""Objective: what every training loss takes and returns."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from holdfast.component import Component
from holdfast.draws import Draws
from holdfast.inference import side_door
from holdfast.search import Function, climb
from holdfast.threat import Threat


@dataclass(frozen=True)
class Progress:
    """Where a training stands: optimiser step ``step`` of ``total_steps``, counted from 0.

    All batches that are accumulated to one step, and all processes' shares of it, see the same step, so that it is
    the step that one large batch would make.
    """

    step: int
    total_steps: int
    seed: int = 0
    """With the step and an example's number in it, this determines everything that an objective draws."""
    offset: int = 0
    """Number of the first example within the whole step, where batches are accumulated or processes share it."""
    images: int = 0
    """Examples of the whole step; 0 where they are those at hand."""
    processes: int = 1
    """So many work on the batch and call the objective together."""
    share: float = 1.0
    """Of the batch that is at hand, by examples."""

    @property
    def fraction(self) -> float:
        """0 at the first step, towards 1 at the last."""
        return self.step / self.total_steps

    def ramp(self, end: float, begin: float = 0.0) -> float:
        """0 up to the share ``begin`` of the training, 1 from the share ``end`` on, a straight line between."""
        if end <= begin:
            return float(self.fraction >= end)
        return min(max((self.fraction - begin) / (end - begin), 0.0), 1.0)

    @property
    def alone(self) -> Progress:
        """The same place for a process that asks by itself, for its examples only."""
        return dataclasses.replace(self, processes=1, share=1.0)

    @classmethod
    def end(cls) -> Progress:
        """A finished training: every ramp has arrived."""
        return cls(1, 1)

    def draws(self, x: Tensor, *salt: int) -> Draws:
        """What each example of the step's batch draws."""
        numbers = torch.arange(self.offset, self.offset + len(x), device=x.device)
        return Draws.of(self.seed, numbers, self.step, *salt)

    def random_points(self, x: Tensor, threat: Threat) -> Tensor:
        """A random point of the threat set around each input of the step's batch."""
        return threat.random_point(x, self.draws(x))

    def normal(self, x: Tensor, copies: int = 1, *salt: int) -> Tensor:
        """Standard normal numbers for so many copies of the step's batch, one behind the other, (copies · N, ...).

        Those of a copy of an example hang on (seed, step, number of the example, number of the copy) and the salt.
        """
        draws, count = self.draws(x, *salt), x.flatten(1).shape[1]
        noise = torch.cat([draws.normal(count, at=copy * count) for copy in range(copies)])
        return noise.to(x).view(-1, *x.shape[1:])

    def mean(self, own: Tensor) -> Tensor:
        """Means over the whole batch, from those over the examples at hand; differentiable, gradients of all
        processes included. For what is not linear in the batch: losses of examples are averaged by the loop."""
        if self.processes == 1:
            return own
        total: Tensor = _Sum.apply(self.share * own)
        return total


class _Sum(torch.autograd.Function):
    """The sum over all processes, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.detach().clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient: Tensor = _Sum.apply(gradients[0].contiguous())
        return gradient


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
    """A loss over a batch: the mean of one value per example.

    Who asks without gradients gets the same value: most losses differentiate on the way.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in {"loss", "perturbed", "loss_at"} & vars(cls).keys():
            setattr(cls, name, side_door(vars(cls)[name]))

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

    def present(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> None:
        """Let the model read what the loss trains it on: the forward passes in its own mode that ``loss`` makes.

        BatchNorm statistics of averaged weights are estimated on them. Where the loss makes much more than those,
        this leaves it out; an objective that remembers something between steps keeps it.
        """
        self.loss(model, x, y, threat, progress)


class Perturbing(Objective):
    """A loss of inputs that a search perturbs first: the search, and the loss at what it found, each by itself.

    So a wrapper such as ``awp`` can search once and ask for the loss at several weights.
    """

    @abstractmethod
    def perturbed(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> Any:
        """The inputs to train on, (N, ...); searched in eval mode, without a trace.

        A search that found out more than inputs gives a tuple, one that has nothing to find now None.
        """

    @abstractmethod
    def loss_at(
        self, model: nn.Module, x: Tensor, y: Tensor, x_adv: Any, threat: Threat, progress: Progress
    ) -> Loss:
        """The loss at what ``perturbed`` gave: one forward pass in the model's own mode."""

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> Loss:
        x_adv = self.perturbed(model, x, y, threat, progress)
        return self.loss_at(model, x, y, x_adv, threat, progress)


class Searching(Perturbing):
    """A loss of inputs that one ascent found: its last point, as the methods are defined."""

    steps: PositiveInt = 10
    """Steps of the inner ascent."""
    step_size: PositiveFloat = 0.25
    """Length of a step in units of the radius that is searched: eps, if nothing else is said."""

    def climbed(self, function: Function, x: Tensor, threat: Threat, start: Tensor) -> Tensor:
        """Where the ascent of this function ends, (N, ...)."""
        return climb(function, x, threat, steps=self.steps, step_size=self.step_size * threat.eps, start=start)
