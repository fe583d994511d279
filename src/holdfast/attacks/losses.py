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
    return F.cross_entropy(logits, y, reduction="none").clamp(max=torch.finfo(logits.dtype).max / 4)


def gap(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j≠y} z_j − z_y, the margin with the other sign: positive where the model is wrong."""
    own, others = logits.gather(1, y[:, None]), logits.scatter(1, y[:, None], -torch.inf)
    return (floored(others.amax(1, keepdim=True)) - floored(own)).squeeze(1)


def gap_among(logits: Tensor, y: Tensor, open_targets: Tensor) -> Tensor:
    """The gap to the classes (N, K) that are open, the own among them."""
    return gap(logits.masked_fill(~open_targets, -torch.inf), y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein, 2020): the gap over z_(1) − z_(3), the largest and the third.

    The scale of the logits does not change it. Needs three classes; where a mask leaves fewer it is the gap.
    """
    largest = logits.topk(3, dim=1).values
    return gap(logits, y) / _spread(largest[:, 0], largest[:, 2])


def targeted_gap(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """z_t − z_y."""
    return (floored(logits.gather(1, target[:, None])) - floored(logits.gather(1, y[:, None]))).squeeze(1)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """(z_t − z_y) / (z_(1) − (z_(3) + z_(4)) / 2) (Croce & Hein, 2020). Needs four classes; where a mask leaves
    fewer it is the gap."""
    largest = logits.topk(4, dim=1).values
    return targeted_gap(logits, y, target) / _spread(largest[:, 0], largest[:, 2:].sum(1) / 2)


def _spread(first: Tensor, other: Tensor) -> Tensor:
    """Their difference, 1 where the other is a masked class's."""
    return torch.where(other == -torch.inf, 1.0, first - other + 1e-12)


def floored(logits: Tensor) -> Tensor:
    """Logits in which −inf, the mask of a class, is a number as low as differences of two of them allow."""
    return logits.clamp(min=torch.finfo(logits.dtype).min / 4)


def divergence(clean_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(clean_logits) ‖ softmax(logits)) of each example, (N,), differentiable in both; a class that the
    first masks with −inf counts for nothing."""
    target, log_probabilities = F.log_softmax(clean_logits, 1), F.log_softmax(logits, 1)
    each = F.kl_div(floored(log_probabilities), floored(target), reduction="none", log_target=True)
    return each.sum(1)


def asked(
    model: nn.Module, points: Tensor, y: Tensor, value: Callable[[Tensor], Tensor], samples: int = 1
) -> tuple[Tensor, Tensor]:
    """A value of the model's logits at some points, (n, ...), and whether the model is wrong there, (n,) bool.

    Args:
        value: from logits (n, K), differentiable.
        samples: forward passes, for models that answer at random (EOT, Athalye et al., 2018): the value is their
            mean, and the model is wrong where more than half of them are.
    """
    logits = model(points)
    values, wrong = value(logits), logits.detach().argmax(1) != y
    if samples == 1:
        return values, wrong
    votes = wrong.long()
    for _ in range(samples - 1):
        logits = model(points)
        values = values + value(logits)
        votes += logits.detach().argmax(1) != y
    return values / samples, 2 * votes > samples


def until_wrong(model: nn.Module, y: Tensor, loss: LogitLoss = cross_entropy, samples: int = 1) -> Function:
    """The loss at a point, finished where the model is wrong; both as ``asked`` of so many passes."""

    def function(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        labels = y[rows]
        return asked(model, points, labels, lambda logits: loss(logits, labels), samples)

    return function


def until_wrong_towards(
    model: nn.Module, y: Tensor, target: Tensor, loss: Callable[..., Tensor], samples: int = 1
) -> Function:
    """A targeted loss at a point, finished where the model is wrong, whichever class it names."""

    def function(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        labels, towards = y[rows], target[rows]
        return asked(model, points, labels, lambda logits: loss(logits, labels, towards), samples)

    return function
