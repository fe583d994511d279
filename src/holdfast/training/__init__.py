"""The training loop and what it needs."""

from holdfast.listeners import Observer, Reporter
from holdfast.training.averaging import Averaging, estimate_batch_norm
from holdfast.training.loop import TrainingDiverged, fit
from holdfast.training.optimizers import SGD, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop
from holdfast.training.plan import Training
from holdfast.training.schedules import (
    Constant,
    Cosine,
    Linear,
    MultipleDecay,
    MultiStep,
    OneCycle,
    OneDrop,
    Piecewise,
    Schedule,
    Step,
    Superconvergent,
)

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Averaging",
    "Constant",
    "Cosine",
    "Linear",
    "MultiStep",
    "MultipleDecay",
    "NAdam",
    "Observer",
    "OneCycle",
    "OneDrop",
    "Optimizer",
    "Piecewise",
    "RAdam",
    "RMSprop",
    "Reporter",
    "Schedule",
    "Step",
    "Superconvergent",
    "Training",
    "TrainingDiverged",
    "estimate_batch_norm",
    "fit",
]
