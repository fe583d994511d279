"""The training loop and what it needs."""

from holdfast.training.loop import Reporter, Training, TrainingDiverged, fit
from holdfast.training.optimizers import SGD, Adam, Optimizer
from holdfast.training.schedules import Constant, OneCycle, Schedule, Step

__all__ = [
    "SGD",
    "Adam",
    "Constant",
    "OneCycle",
    "Optimizer",
    "Reporter",
    "Schedule",
    "Step",
    "Training",
    "TrainingDiverged",
    "fit",
]
