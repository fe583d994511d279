"""The default attack: rungs of rising cost, each on what still stands."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import PositiveInt
from torch import Tensor

from holdfast.attacks.attack import Attack
from holdfast.attacks.ensemble import Ensemble
from holdfast.attacks.pgd import PGD, MultiTargeted
from holdfast.attacks.sigma_zero import SigmaZero
from holdfast.threat import Threat

Budget = Literal["quick", "standard", "thorough"]


RUNGS: dict[Budget, tuple[int, int, int, int]] = {
    "quick": (1, 18, 1, 9),
    "standard": (4, 19, 2, 23),
    "thorough": (20, 19, 9, 21),
}
"""Attempts without a target and the steps of each, then targets and the steps towards each."""
FIRST = 2.0
"""Length of the first step in units of eps: from one side of the ball to the other."""
PASSES: dict[Budget, int] = {"quick": 30, "standard": 130, "thorough": 600}


class Ladder(Ensemble, name="ladder"):
    """The strongest that few passes buy: the margin without a target, then towards the likeliest classes.

    PGD on max_{j≠y} z_j − z_y with a step that falls from 2 eps along half a cosine, from several starts; what
    stands is then pushed towards its likeliest classes in turn (see ``MultiTargeted``), with a step that falls from
    2 eps to eps / 50. On images every start is a coarse one (see ``PGD``): what gradients find from nearby, they
    find from there as well, and some of what only Square found besides. Classes that a certificate excludes are
    left out. In l_0 it is σ-zero.
    """

    comparable: ClassVar[bool] = True
    budget: Budget = "standard"
    """Forward passes for an example that the model gets right and that does not fall: ``quick`` 30, ``standard``
    130, ``thorough`` 600."""
    samples: PositiveInt = 1
    """Forward passes at each point, of which gradients are the mean, for models that answer at random (EOT): so
    many times the budget."""

    @property
    def title(self) -> str:
        return f"Ladder ({self.budget})"

    def parts(self, threat: Threat, classes: int) -> list[Attack]:
        restarts, untargeted, targets, steps = RUNGS[self.budget]
        few = min(targets, classes - 1)
        steps = (steps + 1) * targets // few - 1  # in passes, what there are no classes for
        how: dict[str, Any] = {"precision": self.precision, "samples": self.samples}
        start = {"coarse": True, "step_size": FIRST, **how}
        return [
            PGD(loss="margin", schedule="cosine", steps=untargeted, restarts=restarts, **start),
            MultiTargeted(targets=few, schedule="geometric", steps=steps, **start),
            SigmaZero(steps=PASSES[self.budget] - 3, **how),
        ]

    @property
    def passes(self) -> int:
        return self.samples

    def suits(self, part: Attack, x: Tensor, threat: Threat) -> bool:
        return threat.discrete == isinstance(part, SigmaZero)


def default_attack(budget: Budget = "standard") -> Attack:
    """What is run where nobody chose an attack: the ``Ladder``."""
    return Ladder(budget=budget)
