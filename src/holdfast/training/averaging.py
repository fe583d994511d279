"""Averages of the weights along the training, and BatchNorm statistics to go with them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from holdfast.component import Settings
from holdfast.data import Images
from holdfast.inference import eval_mode


class Averaging(Settings):
    """What is averaged, from when on."""

    kind: Literal["ema", "swa"] = "ema"
    """``ema`` weighs the past exponentially less, ``swa`` all steps alike (Izmailov et al., 2018)."""
    decay: float = Field(default=0.995, ge=0, lt=1)
    """Of the exponential average, per optimiser step; smaller at first: min(decay, (1 + t) / (10 + t))."""
    start: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training before which nothing is averaged."""


class WeightAverage:
    """The average of a model's parameters; buffers are the model's own, BatchNorm's are estimated anew."""

    def __init__(self, settings: Averaging, model: nn.Module) -> None:
        self.settings = settings
        self.count = 0
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, fraction: float) -> None:
        """Take the weights after a step into the average."""
        if fraction < self.settings.start:
            self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
            return
        past = self.count / (self.count + 1)
        if self.settings.kind == "ema":
            past = min(self.settings.decay, (1 + self.count) / (10 + self.count)) if self.count else 0.0
        self.count += 1
        for name, parameter in model.named_parameters():
            self.weights[name].lerp_(parameter, 1 - past)

    @contextlib.contextmanager
    def in_place(self, model: nn.Module, images: Images, batch_size: int) -> Iterator[None]:
        """The model with averaged weights and fitting BatchNorm statistics; its own again afterwards."""
        own = {name: value.clone() for name, value in model.state_dict().items()}
        self.apply(model, images, batch_size)
        try:
            yield
        finally:
            model.load_state_dict(own)

    def apply(self, model: nn.Module, images: Images, batch_size: int) -> None:
        """Averaged weights and fitting BatchNorm statistics, to stay."""
        model.load_state_dict(self.weights, strict=False)
        estimate_batch_norm(model, images, batch_size)

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "weights": self.weights}

    def load(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        self.weights = {name: value.clone() for name, value in state["weights"].items()}


@torch.no_grad()
def estimate_batch_norm(model: nn.Module, images: Images, batch_size: int) -> None:
    """BatchNorm's running statistics as the mean over batches of an epoch, in place of what they were."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms or images.epoch_size < 2:
        return
    batch_size = max(batch_size, 2)
    momenta = [norm.momentum for norm in norms]
    with eval_mode(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.training = None, True  # a plain mean over batches
        # A last batch of one image has no variance and is left out.
        batches = [batch for batch in images.order(0, 0).split(batch_size) if len(batch) > 1]
        for x, _ in images.stream(batches):
            model(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
