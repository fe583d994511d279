"""Training losses: one file per family. ``objective.loss(model, x, y, threat, progress)`` → ``Loss``."""

from holdfast.objectives.adversarial import MART, RST, AdversarialTraining, CleanPlusAdversarial
from holdfast.objectives.cross_entropy import CrossEntropy
from holdfast.objectives.expressive import CCIBP, MTLIBP, SABR, STAPS, TAPS, ExpIBP
from holdfast.objectives.fast import FastAT, FreeAT
from holdfast.objectives.ibp import IBP
from holdfast.objectives.input_gradient import CURE, LLR, TULIP, InputGradient
from holdfast.objectives.lipschitz import CertificateRegularisation, LogitAnnealing, MarginHinge, OffsetCrossEntropy
from holdfast.objectives.lipschitz_margin import BCP, EMMA, LMT, GloRo
from holdfast.objectives.max_margin import MMA
from holdfast.objectives.objective import Loss, Objective, Progress
from holdfast.objectives.relaxed import CAP, CROWNIBP, OneStepRelaxation
from holdfast.objectives.smoothing import MACER, Consistency, GaussianNoise, SmoothAdv, Stability
from holdfast.objectives.trades import TRADES
from holdfast.objectives.weight_perturbation import AWP

__all__ = [
    "AWP",
    "BCP",
    "CAP",
    "CCIBP",
    "CROWNIBP",
    "CURE",
    "EMMA",
    "IBP",
    "LLR",
    "LMT",
    "MACER",
    "MART",
    "MMA",
    "MTLIBP",
    "RST",
    "SABR",
    "STAPS",
    "TAPS",
    "TRADES",
    "TULIP",
    "AdversarialTraining",
    "CertificateRegularisation",
    "CleanPlusAdversarial",
    "Consistency",
    "CrossEntropy",
    "ExpIBP",
    "FastAT",
    "FreeAT",
    "GaussianNoise",
    "GloRo",
    "InputGradient",
    "LogitAnnealing",
    "Loss",
    "MarginHinge",
    "Objective",
    "OffsetCrossEntropy",
    "OneStepRelaxation",
    "Progress",
    "SmoothAdv",
    "Stability",
]
