"""What is asked of the outputs: the margins z_y − z_j, merged into the last layer where that is dense."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.bounds.interval import Interval, propagate
from holdfast.bounds.operators import Graph, Linear


def margin_rows(y: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """The rows e_y − e_j of each example, classes j ≠ y ascending, (N, K−1, K)."""
    classes = torch.arange(num_classes - 1, device=y.device)
    others = classes + (classes >= y[:, None])
    return (F.one_hot(y, num_classes)[:, None] - F.one_hot(others, num_classes)).to(dtype)


def interval_margins(graph: Graph, box: Interval, y: Tensor) -> Tensor:
    """Lower bounds of z_y − z_j for the classes j ≠ y ascending, (N, K−1).

    With a dense last layer W the rows W_y − W_j are bounded in one step (last-layer elision): tighter
    than the difference of the logits' bounds, since what the two logits share cancels.
    """
    last = graph.nodes[-1]
    if not isinstance(last.operator, Linear):
        logits = propagate(graph, box)
        rows = margin_rows(y, logits.centre.shape[1], logits.centre.dtype)
        return _apply(rows, logits.centre) - _apply(rows.abs(), logits.radius)
    hidden = propagate(graph, box, stop=last.inputs[0])
    logits_of_centre = last.operator.forward(hidden.centre)
    rows = margin_rows(y, logits_of_centre.shape[1], logits_of_centre.dtype)
    # A product with the rows, not an indexing of W by y: its backward pass adds in a fixed order.
    return _apply(rows, logits_of_centre) - _apply((rows @ last.operator.weight).abs(), hidden.radius)


def _apply(rows: Tensor, vectors: Tensor) -> Tensor:
    """The product of each example's matrix and vector: (N, M, d), (N, d) → (N, M)."""
    return torch.bmm(rows, vectors[:, :, None])[:, :, 0]
