"""Sound bounds on what a network can answer on a whole threat set.

>>> lower, upper = bound_outputs(model, x, threat, method="ibp")    # doctest: +SKIP
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from holdfast.bounds.graph import batch_statistics, trace
from holdfast.bounds.interval import Interval, propagate
from holdfast.bounds.operators import (
    Affine,
    Concatenate,
    Graph,
    Linear,
    Monotone,
    Operator,
    Sum,
    UnsupportedOperator,
)
from holdfast.bounds.rules import register
from holdfast.bounds.specification import interval_margins, margin_rows
from holdfast.component import nearest
from holdfast.inference import check_inputs
from holdfast.threat import Threat

METHODS = ("ibp",)

__all__ = [
    "METHODS",
    "Affine",
    "Concatenate",
    "Graph",
    "Interval",
    "Linear",
    "Monotone",
    "Operator",
    "Sum",
    "UnsupportedOperator",
    "batch_statistics",
    "bound_margins",
    "bound_outputs",
    "interval_margins",
    "margin_rows",
    "propagate",
    "register",
    "trace",
]


def bound_outputs(model: nn.Module, x: Tensor, threat: Threat, method: str = "ibp") -> tuple[Tensor, Tensor]:
    """Lower and upper bounds of the logits over the threat set of each input, (N, K) each.

    The model is bounded in eval mode and left as it was; the bounds are differentiable in its parameters.
    For l_2 and l_1 the interval method bounds the smallest box around the ball.

    Raises:
        ValueError: an unknown method; inputs that make no sense.
        UnsupportedOperator: the model holds an operator without a bound rule.
    """
    check_method(method)
    check_inputs(x, torch.zeros(len(x), dtype=torch.int64, device=x.device), threat)
    box = threat.interval(x)
    logits = propagate(trace(model, x, box=box), Interval.between(*box))
    return logits.lower, logits.upper


def bound_margins(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, method: str = "ibp") -> Tensor:
    """Lower bounds of the margins z_y − z_j over the threat set, classes j ≠ y ascending, (N, K−1).

    An example whose bounds are all positive is certified. Otherwise as ``bound_outputs``.
    """
    check_method(method)
    y = check_inputs(x, y, threat)
    box = threat.interval(x)
    return interval_margins(trace(model, x, box=box), Interval.between(*box), y)


def check_method(method: str) -> None:
    """Refuse the name of a method that does not exist."""
    if method not in METHODS:
        raise ValueError(f"{method!r} is not a bound method; {nearest(method, METHODS)}")
