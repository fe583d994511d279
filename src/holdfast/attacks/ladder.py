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
    """The strongest that few passes buy: the margin without a target, then towards the likeliest classes.

    PGD on max_{j≠y} z_j − z_y with a step that falls from eps along half a cosine; what stands is then pushed
    towards its likeliest classes in turn (see ``MultiTargeted``), with a step that falls from eps to eps / 100.
    Classes that a certificate excludes are left out of both. In l_0, σ-zero.
    """

    budget: Budget = "standard"
    """Forward passes for an example that the model gets right and that does not fall: ``quick`` 30, ``standard``
    130, ``thorough`` about 600."""

    @property
    def title(self) -> str:
        return f"Ladder ({self.budget})"

    def parts(self, threat: Threat, classes: int) -> list[Attack]:
        untargeted, targets, steps = RUNGS[self.budget]
        few = min(targets, classes - 1)
        steps = (steps + 1) * targets // few - 1  # in passes, what there are no classes for
        return [
            PGD(loss="margin", schedule="cosine", steps=untargeted, precision=self.precision),
            MultiTargeted(targets=few, schedule="geometric", steps=steps, precision=self.precision),
        ]


def default_attack(budget: Budget = "standard") -> Attack:
    """What is run where nobody chose an attack: the ``Ladder``."""
    return Ladder(budget=budget)
