"""Optimisers as components of a recipe."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import nn

from holdfast.component import Component

NORMALISATIONS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


class Optimizer(Component, family="optimizers"):
    """Updates parameters from their gradients; the schedule scales its learning rate."""

    lr: PositiveFloat
    """Learning rate for the mean loss of a batch, at the schedule's factor 1."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay."""
    decay_norm_and_bias: bool = True
    """Whether biases and the parameters of normalisation layers decay as well."""
    lookahead: PositiveInt | None = None
    """Every so many steps the weights return half the way to where they last returned to (Zhang et al., 2019)."""

    @abstractmethod
    def create(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The torch optimiser of these groups of parameters."""

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The torch optimiser of a model's parameters."""
        spared = {id(p) for p in _norms_and_biases(model)} if not self.decay_norm_and_bias else set()
        decaying = [p for p in model.parameters() if id(p) not in spared]
        groups: list[dict[str, Any]] = [{"params": decaying, "weight_decay": self.weight_decay}]
        if spared:
            rest = [p for p in model.parameters() if id(p) in spared]
            groups.append({"params": rest, "weight_decay": 0.0})
        optimizer = self.create(groups)
        if self.lookahead:
            _look_ahead(optimizer, self.lookahead)
        return optimizer


class SGD(Optimizer, name="sgd"):
    """Stochastic gradient descent with momentum."""

    lr: PositiveFloat = 0.1
    """Learning rate for the mean loss of a batch, at the schedule's factor 1."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum."""
    nesterov: bool = False
    """Nesterov's momentum."""

    def create(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, self.lr, self.momentum, nesterov=self.nesterov)


class Adam(Optimizer, name="adam"):
    """Adam (Kingma & Ba, 2015)."""

    lr: PositiveFloat = 1e-3
    """Learning rate for the mean loss of a batch, at the schedule's factor 1."""

    def create(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.Adam(groups, self.lr)


class AdamW(Optimizer, name="adamw"):
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019)."""

    lr: PositiveFloat = 1e-3
    """Learning rate for the mean loss of a batch, at the schedule's factor 1."""
    weight_decay: NonNegativeFloat = 0.01
    """Weight decay."""

    def create(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, self.lr)


class NAdam(Optimizer, name="nadam"):
    """Adam with Nesterov's momentum (Dozat, 2016)."""

    lr: PositiveFloat = 2e-3
    """Learning rate for the mean loss of a batch, at the schedule's factor 1."""

    def create(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.NAdam(groups, self.lr)


class RAdam(Optimizer, name="radam"):
    """Adam whose first steps make up for the variance of its rate (Liu et al., 2020)."""

    lr: PositiveFloat = 1e-3
    """Learning rate for the mean loss of a batch, at the schedule's factor 1."""

    def create(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.RAdam(groups, self.lr)


class RMSprop(Optimizer, name="rmsprop"):
    """RMSprop (Hinton, 2012)."""

    lr: PositiveFloat = 1e-2
    """Learning rate for the mean loss of a batch, at the schedule's factor 1."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Momentum."""

    def create(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(groups, self.lr, momentum=self.momentum)


def _look_ahead(optimizer: torch.optim.Optimizer, every: int, share: float = 0.5) -> None:
    """Slow weights that follow the fast ones by ``share`` every so many steps, and the fast ones start there again.

    They and the count of steps lie in the groups, which the optimiser's state saves and loads.
    """
    for group in optimizer.param_groups:
        group |= {"slow": [parameter.detach().clone() for parameter in group["params"]], "ahead": 0}

    @torch.no_grad()
    def after(stepped: torch.optim.Optimizer, *_: Any) -> None:
        for group in stepped.param_groups:
            group["ahead"] = (group["ahead"] + 1) % every
            if group["ahead"]:
                continue
            group["slow"] = [
                slow.to(fast).lerp_(fast, share) for slow, fast in zip(group["slow"], group["params"], strict=True)
            ]
            for slow, fast in zip(group["slow"], group["params"], strict=True):
                fast.copy_(slow)

    optimizer.register_step_post_hook(after)


def set_rate(optimizer: torch.optim.Optimizer, lr: float, momentum: float | None) -> None:
    """The learning rate of all groups and, where given, their momentum (Adam's β₁)."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if momentum is not None and "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        elif momentum is not None:
            group["momentum"] = momentum


def _norms_and_biases(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias" or isinstance(module, NORMALISATIONS):
                yield parameter
