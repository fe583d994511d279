"""A training step: the loss of one batch, and what is remembered of it without waiting for the device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.bounds.carried import Carried, carrying
from holdfast.inference import eval_mode, own_inputs
from holdfast.layers import shared_weights
from holdfast.objectives import Objective, Progress
from holdfast.threat import Threat
from holdfast.training.engine import RunningEngine

STEPS_UNASKED = 32
"""Batches between two questions to a device whether all losses were finite."""


class TrainingStep(nn.Module):
    """One forward: the loss of one batch. A module, so that the engine can wrap all of it at once."""

    def __init__(self, model: nn.Module, objective: Objective, threat: Threat, l1: float) -> None:
        super().__init__()
        with torch.no_grad(), eval_mode(model):  # in which no power iteration of a layer goes on
            if l1 and not _weights(model):
                raise ValueError(f"training.l1={l1} needs a layer with a weight of two dimensions or more")
        self.model, self.objective, self.threat, self.l1 = model, objective, threat, l1
        self.carried = Carried()

    def forward(self, x: Tensor, y: Tensor, *progress: Any) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        with shared_weights(), carrying(self.carried), own_inputs(self.model):
            loss = self.objective.loss(self.model, x, y, self.threat, Progress(*progress))
        if not self.l1:
            return loss.total, loss.parts, loss.x_adv
        size = torch.stack([weight.abs().sum() for weight in _weights(self.model)]).sum()
        return loss.total + self.l1 * size, {**loss.parts, "l1": size.detach()}, loss.x_adv


def _weights(model: nn.Module) -> list[Tensor]:
    """Those of dense and convolutional layers, which are matrices or more; biases and norms are vectors.

    Of a parametrised layer what it computes with, of ours the free one; one that several layers share counts once.
    """
    found = [getattr(module, "weight", None) for module in model.modules()]
    return list(
        {id(weight): weight for weight in found if isinstance(weight, Tensor) and weight.dim() > 1}.values()
    )


class Tally:
    """Sums over an epoch's images of the loss and its parts; a part may be absent from some steps."""

    def __init__(self, sums: dict[str, Tensor]) -> None:
        self.names = list(sums)
        self.totals = torch.stack([total for total, _ in sums.values()]) if sums else None
        self.counts = [float(count) for _, count in sums.values()]

    def add(self, values: dict[str, Tensor], count: int) -> None:
        new = [name for name in values if name not in self.names]
        self.names += new
        self.counts += [0.0] * len(new)
        each = list(values.values())
        if self.totals is None:
            self.totals = torch.zeros(0, dtype=torch.float64, device=each[0].device)
        if missing := len(self.names) - len(self.totals):
            self.totals = torch.cat([self.totals, self.totals.new_zeros(missing)])
        if list(values) != self.names:
            each = [values[name] if name in values else torch.zeros_like(each[0]) for name in self.names]
        self.totals.add_(torch.stack(each), alpha=count)
        self.counts = [
            before + count * (name in values) for name, before in zip(self.names, self.counts, strict=True)
        ]

    def over_processes(self, engine: RunningEngine) -> dict[str, Tensor]:
        """The sums of all processes, and of how many images; (2,) each. One may know parts that others do not."""
        names = list(dict.fromkeys(name for own in engine.gathered(self.names) for name in own))
        if not names:
            return {}
        both = torch.zeros(len(names), 2, dtype=torch.float64, device=engine.device)
        if self.totals is not None:
            places = [names.index(name) for name in self.names]
            both[places] = torch.stack([self.totals, self.totals.new_tensor(self.counts)], 1)
        return dict(zip(names, engine.sum(both), strict=True))


class Finite:
    """Whether the losses so far were finite. They stay on the device, and it is asked now and then."""

    def __init__(self, engine: RunningEngine) -> None:
        self._engine = engine
        self._alone = engine.device.type == "cpu" and engine.processes == 1  # asking costs nothing
        self._unasked: list[tuple[int, Tensor]] = []

    def note(self, loss: Tensor, step: int) -> tuple[int, float] | None:
        """Take a step's loss into account; like ``ask`` once in a while."""
        self._unasked.append((step, loss.detach()))
        return self.ask() if self._alone or (step + 1) % STEPS_UNASKED == 0 else None

    def ask(self, *, here: bool = False) -> tuple[int, float] | None:
        """The number of the first step whose loss was not finite, and that loss; None where there is none.

        Args:
            here: in this process alone, where the others may not ask.
        """
        numbers, losses = [step for step, _ in self._unasked], [loss for _, loss in self._unasked]
        values = torch.stack(losses).tolist() if losses else []
        found = next(
            ((n, value) for n, value in zip(numbers, values, strict=True) if not math.isfinite(value)), None
        )
        self._unasked = []
        everywhere = [found] if here else self._engine.gathered(found)
        return min((one for one in everywhere if one is not None), default=None)
