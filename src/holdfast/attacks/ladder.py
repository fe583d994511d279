"""The default attack: rungs of rising cost, each on what still stands."""

from __future__ import annotations

from typing import Literal

from holdfast.attacks.attack import Attack
from holdfast.attacks.ensemble import Ensemble
from holdfast.attacks.pgd import PGD, MultiTargeted
from holdfast.threat import Threat

Budget = Literal["quick", "standard", "thorough"]


RUNGS: dict[Budget, tuple[int, int, int]] = {"quick": (18, 1, 9), "standard": (29, 3, 32), "thorough": (50, 9, 60)}
"""Steps without a target, targets, and steps towards each."""


class Ladder(Ensemble, name="ladder"):
    budget: Budget = "standard"

    @property
    def title(self) -> str:
        return f"Ladder ({self.budget})"

    def parts(self, threat: Threat, classes: int) -> list[Attack]:
        untargeted, targets, targeted = RUNGS[self.budget]
        return [
            PGD(loss="margin", schedule="cosine", steps=untargeted, precision=self.precision),
            MultiTargeted(targets=targets, schedule="geometric", steps=targeted, precision=self.precision),
        ]


def default_attack(budget: Budget = "standard") -> Attack:
    """What is run where nobody chose an attack."""
    return Ladder(budget=budget)
