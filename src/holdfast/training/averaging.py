"""Averages of the weights along the training, and BatchNorm statistics to go with them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from holdfast.component import Settings
from holdfast.inference import without_trace
from holdfast.layers import BatchCentering

Forward = Callable[[nn.Module], object]
"""What lets a model read a batch as in training."""


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
    def in_place(self, model: nn.Module, estimate: Forward) -> Iterator[None]:
        """The model with averaged weights and the BatchNorm statistics that ``estimate`` gives it; its own again
        afterwards."""
        own = {name: value.clone() for name, value in model.state_dict().items()}
        self.apply(model, estimate)
        try:
            yield
        finally:
            model.load_state_dict(own)

    def apply(self, model: nn.Module, estimate: Forward) -> None:
        """Averaged weights and the BatchNorm statistics that ``estimate`` gives the model, to stay."""
        model.load_state_dict(self.weights, strict=False)
        estimate(model)

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "weights": self.weights}

    def load(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        self.weights = {name: value.clone() for name, value in state["weights"].items()}


def estimate_batch_norm(
    model: nn.Module, forwards: Iterable[Forward], total: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Running statistics of BatchNorm and BatchCentering as plain means over batches, in place of what they were.

    Each forward is made in train mode and sees the statistics estimated so far where it passes through eval mode,
    as a search for adversarial inputs does; the first sees the model's own. A BatchNorm that no forward updates
    keeps what it has, and nothing else changes: other buffers, modes and random state.

    Args:
        forwards: each lets the model read one batch, of two images at least, as in training.
        total: the sum over several processes, where each makes forwards of its own; of this one alone by default.
    """
    batch_norm: Any = nn.modules.batchnorm._BatchNorm
    norms: list[Any] = [m for m in model.modules() if isinstance(m, batch_norm | BatchCentering)]
    norms = [norm for norm in norms if norm.running_mean is not None]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        with without_trace(model), torch.enable_grad():
            for norm in norms:
                if isinstance(norm, batch_norm):  # a plain mean over what it sees from now on
                    norm.num_batches_tracked.zero_()
                    norm.momentum = None
            number = 0
            for number, forward in enumerate(forwards, start=1):
                for norm in norms:
                    if isinstance(norm, BatchCentering):
                        norm.momentum = 1 / number
                forward(model)
            found = [[value.clone() for value in _statistics(norm)] for norm in norms]
            counts = [float(norm.num_batches_tracked) if isinstance(norm, batch_norm) else number for norm in norms]
    finally:
        for module, training in modes:
            module.training = training
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    added = total or torch.clone
    for norm, count, values in zip(norms, counts, found, strict=True):
        everywhere = float(added(values[0].new_tensor(count)))
        for own, value in zip(_statistics(norm), values, strict=True):
            summed = added(count * value)
            if everywhere:
                own.copy_(summed / everywhere)


def _statistics(norm: nn.Module) -> list[Tensor]:
    return [value for name, value in norm.named_buffers(recurse=False) if name in ("running_mean", "running_var")]
