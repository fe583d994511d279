"""Optimisers as components of a recipe."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import nn

from holdfast.component import Component


class Optimizer(Component, family="optimizers"):
    """Updates parameters from their gradients; the schedule scales its learning rate."""

    lr: PositiveFloat
    """Learning rate for the mean loss of a batch, at the schedule's factor 1."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay."""

    @abstractmethod
    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The torch optimiser of these parameters."""


class Adam(Optimizer, name="adam"):
    """Adam (Kingma & Ba, 2015)."""

    lr: PositiveFloat = 1e-3
    """Learning rate for the mean loss of a batch, at the schedule's factor 1."""

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.lr, weight_decay=self.weight_decay)


class SGD(Optimizer, name="sgd"):
    """Stochastic gradient descent with momentum."""

    lr: PositiveFloat = 0.1
    """Learning rate for the mean loss of a batch, at the schedule's factor 1."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum."""
    nesterov: bool = False
    """Nesterov's momentum."""

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            parameters, self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov
        )
