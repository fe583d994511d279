"""Attacks one after the other, each on what those before it left standing."""

from __future__ import annotations

import logging
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from holdfast.attacks.attack import Attack, Targets
from holdfast.attacks.square import Square
from holdfast.search import Ascent
from holdfast.threat import Threat

STRIDE = 1_000_000
"""Attempts of the parts are numbered in blocks of so many."""


class Ensemble(Attack):
    """The parts that a member names, in their order."""

    thorough: ClassVar[bool] = True
    comparable: ClassVar[bool] = False
    """Whether what its parts ascend is of one kind, so that the best point of all of them is."""

    @abstractmethod
    def parts(self, threat: Threat, classes: int) -> list[Attack]:
        """The attacks in order."""

    def perturb(self, model: nn.Module, targets: Targets, threat: Threat) -> Ascent:
        result = Ascent.before(targets.x)
        for number, part in enumerate(self.parts(threat, targets.logits.shape[1])):
            rows = result.unfinished
            if not len(rows):
                break
            if not self.suits(part, targets.x, threat):
                continue
            found = part.attempt(model, targets.take(rows), threat)
            if part.minimum_norm:
                found.finished.logical_and_(threat.distance(targets.x[rows], found.x) <= threat.eps)
                found.value.fill_(-torch.inf)
            found.restart.add_(number * STRIDE)
            result.absorb(rows, found, keep_better=self.comparable or number == 0)
        return result

    def suits(self, part: Attack, x: Tensor, threat: Threat) -> bool:
        """Whether a part can be run on these inputs."""
        if isinstance(part, Square) and x.dim() != 4:
            logging.getLogger("holdfast").warning("%s without Square: its patches need images", self.title)
            return False
        return True

    def describe(self, restart: int, step: int) -> str:
        part = self.parts(Threat("linf", 1), 10)[restart // STRIDE]
        return part.describe(restart % STRIDE, step)
