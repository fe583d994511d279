"""AutoAttack: a fixed ensemble without settings to tune."""

from __future__ import annotations

import logging
from typing import Literal

from torch import nn

from holdfast.attacks.apgd import APGD, APGDTargeted
from holdfast.attacks.attack import Attack, Targets
from holdfast.attacks.ensemble import Ensemble
from holdfast.attacks.fab import FAB
from holdfast.attacks.pgd import PGD
from holdfast.attacks.square import Square
from holdfast.search import Ascent
from holdfast.threat import Threat


class AutoAttack(Ensemble, name="autoattack"):
    """The ensemble of Croce & Hein (2020), each part on what the ones before left standing.

    Before the published parts 20 steps on the margin break most of what falls, for a third of a per cent of the
    passes; in an evaluation with deterministic certificates certified examples are left out, and in the targeted
    parts the classes that an example is certified against. With ``reference`` none of it.

    ``standard``: APGD-CE, targeted APGD on 9 classes, targeted FAB on 9 classes, Square of 5,000 queries; 100
    steps each. ``plus``: five restarts of APGD-CE, APGD-DLR and FAB without targets, Square, targeted APGD and FAB.
    ``rand``: APGD-CE and APGD-DLR with gradients averaged over 20 passes, for models that answer at random.
    For l_1 APGD-CE has five restarts and the targeted parts five classes. ``quick``: APGD-CE and three classes of
    targeted APGD, 30 steps each, which is no published protocol. With fewer than four classes the margin
    stands for the DLR loss.
    """

    version: Literal["standard", "plus", "rand", "quick"] = "standard"
    """Which ensemble of the paper's, or the quick one."""
    reference: bool = False
    """The original's passes exactly: no rung before it; an evaluation attacks what is certified, too, and towards
    every class."""

    @property
    def title(self) -> str:
        return "AutoAttack" + ("" if self.version == "standard" else f" ({self.version})")

    @property
    def brief(self) -> Attack:
        return self.model_copy(update={"version": "quick"})

    @property
    def heeds_certificates(self) -> bool:
        return not self.reference

    def parts(self, threat: Threat, classes: int) -> list[Attack]:
        """The ensemble's attacks in order."""
        precision = self.precision
        if self.version == "rand":
            losses: tuple[Literal["cross-entropy", "dlr"], ...] = ("cross-entropy", "dlr")
            return [APGD(loss=loss, samples=self.passes, precision=precision) for loss in losses]
        if self.version == "quick":
            return [APGD(steps=30, precision=precision), APGDTargeted(steps=30, targets=3, precision=precision)]
        sparse, others = threat.sparse, classes - 1
        targets = min(5 if sparse else 9, others)
        restarts = 5 if sparse or self.version == "plus" else 1
        targeted = APGDTargeted(targets=targets, precision=precision)
        fab = FAB(targets=targets, within_eps=True, precision=precision)
        square = Square(rescaled=False, precision=precision)  # as its published code has it
        ce = APGD(restarts=restarts, precision=precision)
        margin = PGD(loss="margin", schedule="cosine", steps=20, precision=precision)
        first: list[Attack] = [] if self.reference else [margin]
        if self.version == "standard":
            return [*first, ce, targeted, fab, square]
        dlr = APGD(loss="dlr", restarts=5, precision=precision)
        return [*first, ce, dlr, fab.model_copy(update={"restarts": 5, "targeted": False}), square, targeted, fab]

    @property
    def passes(self) -> int:
        return 20 if self.version == "rand" else 1

    def perturb(self, model: nn.Module, targets: Targets, threat: Threat) -> Ascent:
        classes = targets.logits.shape[1]
        if classes < 4:
            logging.getLogger("holdfast").warning(
                "AutoAttack on %d classes: the margin stands for the DLR loss, which needs four", classes
            )
        return super().perturb(model, targets, threat)
