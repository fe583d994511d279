"""Certificate and Certifier: what every certification method takes and returns."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from holdfast.component import Component
from holdfast.threat import Threat


class SoundnessError(RuntimeError):
    """An attack broke an example that was certified in the same threat model: one of the two is wrong."""

    def __init__(self, message: str, example: int, x: Tensor, x_adv: Tensor) -> None:
        super().__init__(message)
        self.example, self.x, self.x_adv = example, x, x_adv


@dataclass(frozen=True)
class Certificate:
    """What is guaranteed of each of N examples."""

    prediction: Tensor
    """The model's class for the unperturbed input, (N,) int64."""
    verified: Tensor
    """Right, and right on the whole threat set, (N,) bool."""
    radius: Tensor
    """The largest radius found for which the example is verified, (N,) float64 in input units: at least eps where
    and only where verified, 0 where the prediction is wrong, inf where nothing in the box changes it. The closed
    ball of this radius is meant."""
    status: list[str]
    """"verified", "undecided", "wrong" (the clean prediction is) or "error" (a bound or a logit is NaN or inf)."""
    guarantee: str
    """"deterministic", "probabilistic(alpha)" or "estimate"."""
    unproven: Tensor | None = None
    """The smallest radius that was asked in vain, (N,) float64, inf where none was: of those between ``radius`` and
    it nothing is known. None where the method's own ``radius`` was found, to within its tolerance."""
    margin: Tensor | None = None
    """The lowest margin bound on the threat set, (N,), where the method has one."""
    method: list[str] | None = None
    """By which of several methods each example was judged."""
    seconds: Tensor | None = None
    """Spent on each example, (N,) float64: its share of the batches it was in."""
    samples: Tensor | None = None
    """Noisy copies spent on each example, (N,) int64, by a certifier that samples."""
    abstained: Tensor | None = None
    """Where a certifier that samples is not sure of any class, (N,) bool."""


def just_below(radius: Tensor) -> Tensor:
    """The next smaller numbers, but at least 0: what holds within an open ball holds within these closed ones."""
    return torch.nextafter(radius, torch.zeros_like(radius)).clamp(min=0)


class Certifier(Component, family="certifiers"):
    """Proves predictions constant on the threat set around each input."""

    def subject(self, model: nn.Module) -> nn.Module:
        """The classifier that the certificates speak of, where it is another one than the model."""
        return model

    @property
    def knows_radii(self) -> bool:
        """Whether it answers about radii other than the threat's eps, when it is asked."""
        return True

    @abstractmethod
    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, seed: int = 0, batch_size: int = 256
    ) -> Certificate:
        """Certify every example; the model is left exactly as it was.

        Args:
            model: any module from (N, ...) inputs to (N, K) logits; certified in eval mode.
            x: inputs in the threat's box, (N, ...), floating.
            y: labels, (N,) integers in 0..K−1.
            seed: what a sampling certifier draws for an example depends on it and the example's number only.
            batch_size: at most so many examples at once.

        Raises:
            ValueError: inputs or labels that make no sense, or a model the method cannot handle.
        """
