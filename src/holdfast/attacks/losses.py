"""What attacks ascend: a value per example from logits (N, K) and labels (N,), large where the model errs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.search import Function

LogitLoss = Callable[[Tensor, Tensor], Tensor]
LossName = Literal["cross-entropy", "dlr", "margin", "kl"]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """−log softmax(z)_y."""
    return F.cross_entropy(logits, y, reduction="none")


def gap(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j≠y} z_j − z_y, the margin with the other sign: positive where the model is wrong."""
    own = logits.gather(1, y[:, None])
    return (logits.scatter(1, y[:, None], -torch.inf).amax(1, keepdim=True) - own).squeeze(1)


def gap_among(logits: Tensor, y: Tensor, open_targets: Tensor) -> Tensor:
    """The gap to the classes (N, K) that are open, the own among them."""
    return gap(logits.masked_fill(~open_targets, -torch.inf), y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein, 2020): the gap over z_(1) − z_(3), the largest and the third.

    The scale of the logits does not change it. Needs three classes.
    """
    largest = logits.topk(3, dim=1).values
    return gap(logits, y) / (largest[:, 0] - largest[:, 2] + 1e-12)


def targeted_gap(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """z_t − z_y."""
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """(z_t − z_y) / (z_(1) − (z_(3) + z_(4)) / 2) (Croce & Hein, 2020). Needs four classes."""
    largest = logits.topk(4, dim=1).values
    return targeted_gap(logits, y, target) / (largest[:, 0] - largest[:, 2:].sum(1) / 2 + 1e-12)


def divergence(clean_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(clean_logits) ‖ softmax(logits)) of each example, (N,), differentiable in both."""
    target, log_probabilities = F.log_softmax(clean_logits, 1), F.log_softmax(logits, 1)
    return F.kl_div(log_probabilities, target, reduction="none", log_target=True).sum(1)


def until_wrong(model: nn.Module, y: Tensor, loss: LogitLoss = cross_entropy, samples: int = 1) -> Function:
    """The loss at a point, finished where the model is wrong.

    Args:
        samples: forward passes whose mean loss is taken, for models that answer at random (EOT, Athalye et
            al., 2018); the last of them decides whether the model is wrong.
    """

    def function(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        labels = y[rows]
        logits = model(points)
        values = loss(logits, labels)
        for _ in range(samples - 1):
            logits = model(points)
            values = values + loss(logits, labels)
        return values / samples, logits.detach().argmax(1) != labels

    return function


def until_wrong_towards(model: nn.Module, y: Tensor, target: Tensor, loss: Callable[..., Tensor]) -> Function:
    """A targeted loss at a point, finished where the model is wrong, whichever class it names."""

    def function(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        logits, labels = model(points), y[rows]
        return loss(logits, labels, target[rows]), logits.detach().argmax(1) != labels

    return function
