"""Attacks: one file each. An attack is called as ``PGD(steps=50)(model, x, y, threat, seed=0)``."""

from holdfast.attacks.apgd import APGD, APGDTargeted
from holdfast.attacks.attack import Attack, AttackResult, GradientAttack
from holdfast.attacks.auto import AutoAttack
from holdfast.attacks.carlini_wagner import CarliniWagner
from holdfast.attacks.ddn import DDN
from holdfast.attacks.deepfool import DeepFool
from holdfast.attacks.fab import FAB
from holdfast.attacks.fgsm import FGSM
from holdfast.attacks.fmn import FMN
from holdfast.attacks.ladder import Ladder, default_attack
from holdfast.attacks.pgd import PGD, MultiTargeted, Noise
from holdfast.attacks.sigma_zero import SigmaZero
from holdfast.attacks.square import Square

__all__ = [
    "APGD",
    "DDN",
    "FAB",
    "FGSM",
    "FMN",
    "PGD",
    "APGDTargeted",
    "Attack",
    "AttackResult",
    "AutoAttack",
    "CarliniWagner",
    "DeepFool",
    "GradientAttack",
    "Ladder",
    "MultiTargeted",
    "Noise",
    "SigmaZero",
    "Square",
    "default_attack",
]
