"""Training losses: one file per family. ``objective.loss(model, x, y, threat, progress)`` → ``Loss``."""

from holdfast.objectives.adversarial import AdversarialTraining
from holdfast.objectives.cross_entropy import CrossEntropy
from holdfast.objectives.expressive import CCIBP, MTLIBP, SABR, STAPS, ExpIBP
from holdfast.objectives.ibp import IBP
from holdfast.objectives.lipschitz_margin import BCP, LMT, GloRo
from holdfast.objectives.objective import Loss, Objective, Progress
from holdfast.objectives.relaxed import CAP, CROWNIBP, OneStepRelaxation
from holdfast.objectives.trades import TRADES

__all__ = [
    "BCP",
    "CAP",
    "CCIBP",
    "CROWNIBP",
    "IBP",
    "LMT",
    "MTLIBP",
    "SABR",
    "STAPS",
    "TRADES",
    "AdversarialTraining",
    "CrossEntropy",
    "ExpIBP",
    "GloRo",
    "Loss",
    "Objective",
    "OneStepRelaxation",
    "Progress",
]
