"""Sound bounds on what a network can answer on a whole threat set.

>>> lower, upper = bound_outputs(model, x, threat, method="crown-ibp")    # doctest: +SKIP
"""

from holdfast.bounds.bound import METHODS, Bounder, BoundMethod, bound_margins, bound_outputs
from holdfast.bounds.graph import batch_statistics, trace
from holdfast.bounds.interval import Interval
from holdfast.bounds.operators import (
    Affine,
    Concatenate,
    Convolution,
    Elementwise,
    Graph,
    Linear,
    Monotone,
    Operator,
    Rectifier,
    Sum,
    UnsupportedOperator,
)
from holdfast.bounds.region import Region, region_of
from holdfast.bounds.rules import register
from holdfast.bounds.specification import interval_margins, margin_rows, robust_cross_entropy

__all__ = [
    "METHODS",
    "Affine",
    "BoundMethod",
    "Bounder",
    "Concatenate",
    "Convolution",
    "Elementwise",
    "Graph",
    "Interval",
    "Linear",
    "Monotone",
    "Operator",
    "Rectifier",
    "Region",
    "Sum",
    "UnsupportedOperator",
    "batch_statistics",
    "bound_margins",
    "bound_outputs",
    "interval_margins",
    "margin_rows",
    "region_of",
    "register",
    "robust_cross_entropy",
    "trace",
]
