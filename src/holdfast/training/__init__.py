"""The training loop and what it needs."""

from holdfast.training.loop import Reporter, Training, TrainingDiverged, fit
from holdfast.training.optimizers import SGD, Adam, AdamW, NAdam, Optimizer, RMSprop
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
    "Constant",
    "Cosine",
    "Linear",
    "MultiStep",
    "MultipleDecay",
    "NAdam",
    "OneCycle",
    "OneDrop",
    "Optimizer",
    "Piecewise",
    "RMSprop",
    "Reporter",
    "Schedule",
    "Step",
    "Superconvergent",
    "Training",
    "TrainingDiverged",
    "fit",
]
