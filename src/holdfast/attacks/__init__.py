"""Attacks: one file each. An attack is called as ``PGD(steps=50)(model, x, y, threat, seed=0)``."""

from holdfast.attacks.attack import Attack, AttackResult
from holdfast.attacks.fgsm import FGSM
from holdfast.attacks.pgd import PGD

__all__ = ["FGSM", "PGD", "Attack", "AttackResult"]
