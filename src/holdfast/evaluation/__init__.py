"""The sandwich: for every example, what is certified below and what an attack reached above."""

from holdfast.evaluation.accuracy import broken_from, certified, stands
from holdfast.evaluation.curve import sandwich_curve
from holdfast.evaluation.sandwich import Evaluation, evaluate
from holdfast.evaluation.summary import certified_at, proportion_interval

__all__ = [
    "Evaluation",
    "broken_from",
    "certified",
    "certified_at",
    "evaluate",
    "proportion_interval",
    "sandwich_curve",
    "stands",
]
