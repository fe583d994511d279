"""Training losses: one file per family. ``objective.loss(model, x, y, threat, progress)`` → ``Loss``."""

from holdfast.objectives.adversarial import AdversarialTraining
from holdfast.objectives.cross_entropy import CrossEntropy
from holdfast.objectives.ibp import IBP
from holdfast.objectives.objective import Loss, Objective, Progress
from holdfast.objectives.trades import TRADES

__all__ = ["IBP", "TRADES", "AdversarialTraining", "CrossEntropy", "Loss", "Objective", "Progress"]
