"""The default attack: rungs of rising cost, each on what still stands."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from holdfast.attacks.attack import Attack
from holdfast.attacks.ensemble import Ensemble
from holdfast.attacks.pgd import PGD, MultiTargeted
from holdfast.attacks.sigma_zero import SigmaZero
from holdfast.attacks.square import Square
from holdfast.threat import Threat

Budget = Literal["quick", "standard", "thorough"]


RUNGS: dict[Budget, tuple[int, int, int, int]] = {
    "quick": (18, 1, 9, 0),
    "standard": (29, 3, 32, 0),
    "thorough": (49, 9, 33, 240),
}
"""Steps without a target, targets, steps towards each, and queries."""
FIRST = 2.0
"""Length of the first step in units of eps: from one side of the ball to the other."""
PASSES: dict[Budget, int] = {"quick": 30, "standard": 130, "thorough": 600}


class Ladder(Ensemble, name="ladder"):
    """The strongest that few passes buy: the margin without a target, then towards the likeliest classes.

    PGD on max_{j≠y} z_j − z_y with a step that falls from 2 eps along half a cosine; what stands is then pushed
    towards its likeliest classes in turn (see ``MultiTargeted``), with a step that falls from 2 eps to eps / 50.
    Classes that a certificate excludes are left out of both. ``thorough`` ends with Square from the best point so
    far, on images. In l_0 it is σ-zero.
    """

    comparable: ClassVar[bool] = True
    budget: Budget = "standard"
    """Forward passes for an example that the model gets right and that does not fall: ``quick`` 30, ``standard``
    130, ``thorough`` about 600."""

    @property
    def title(self) -> str:
        return f"Ladder ({self.budget})"

    def parts(self, threat: Threat, classes: int) -> list[Attack]:
        untargeted, targets, steps, queries = RUNGS[self.budget]
        few = min(targets, classes - 1)
        steps = (steps + 1) * targets // few - 1  # in passes, what there are no classes for
        how: dict[str, Any] = {"precision": self.precision}
        return [
            PGD(loss="margin", schedule="cosine", step_size=FIRST, steps=untargeted, **how),
            MultiTargeted(targets=few, schedule="geometric", step_size=FIRST, steps=steps, **how),
            Square(queries=max(queries, 1), warm=True, **how),
            SigmaZero(steps=PASSES[self.budget] - 3, **how),
        ]

    def suits(self, part: Attack, x: Tensor, threat: Threat) -> bool:
        if isinstance(part, Square):
            return self.budget == "thorough" and x.dim() == 4 and not threat.discrete
        return threat.discrete == isinstance(part, SigmaZero)


def default_attack(budget: Budget = "standard") -> Attack:
    """What is run where nobody chose an attack: the ``Ladder``."""
    return Ladder(budget=budget)
