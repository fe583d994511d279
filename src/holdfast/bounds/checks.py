"""Whether a graph is the module that it was traced from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from holdfast.bounds.interval import Interval, rule
from holdfast.bounds.operators import Graph, UnsupportedOperator, apply, walk
from holdfast.inference import masked_classes


def refuse_masks(model: nn.Module, logits: Tensor) -> None:
    """Refuse classes without an answer, unless a training that diverged has made its weights that large."""
    masks = masked_classes(logits)
    if masks and all(bool((weight.abs() < 1e6).all()) for weight in model.parameters()):
        raise UnsupportedOperator(f"bounds have no word for -inf: {masks}")


def check(graph: Graph, model: nn.Module, points: Tensor) -> None:
    """The graph at single points must be the module, also in a batch of another size than the sample's.

    Where it gives NaN or inf, as a weight may, no bound comes of it.
    """
    generator = torch.Generator().manual_seed(0)
    scattered = points[:1] + torch.randn(6, *points.shape[1:], generator=generator).to(points)
    points = torch.cat([points, scattered])
    with torch.no_grad():
        logits = model(points.clone())
        try:
            traced = walk(graph, {0: Interval.point(points)}, lambda number, operator, *v: rule(operator, *v))[
                len(graph.nodes)
            ].centre
            for head in graph.heads:
                traced = apply(head, traced)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as fault:
            raise UnsupportedOperator(
                f"{type(model).__name__} computes something from the size of the batch: {fault}"
            ) from fault
    if traced.shape != logits.shape or not torch.allclose(
        traced, logits.where(traced.isfinite(), traced), rtol=0, atol=_rounding(logits), equal_nan=True
    ):
        raise UnsupportedOperator(
            f"the operators traced from {type(model).__name__} do not reproduce its output; does its forward "
            "change a tensor in place that it reads again, or depend on the values it is given?"
        )


def _rounding(logits: Tensor) -> float:
    """What two orders of the same arithmetic may differ by: little of the spread, less of the size."""
    finite = logits[logits.isfinite()].double()
    if not len(finite):
        return 0.0
    return float(1e-3 * (finite - finite.mean()).abs().max() + 1e-5 * finite.abs().max())
