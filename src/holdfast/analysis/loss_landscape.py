"""The loss along its own gradient step, and how tight a relaxation is (Lee et al., 2021)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from holdfast.bounds import BoundMethod, interval_margins, margin_rows, region_of, robust_cross_entropy, trace
from holdfast.bounds.linear import LinearBound, backward, sweep
from holdfast.bounds.optimised import one_step_slopes
from holdfast.bounds.region import Region
from holdfast.bounds.relaxation import slopes_by
from holdfast.inference import check_inputs, door, frozen_eval, own_inputs
from holdfast.threat import Threat

POINTS = (0.0, *(0.5 * 10 ** (i / 9) for i in range(10)), 1.0)
"""Lengths of the step that are probed, in units of the learning rate: 0, ten from 0.5 to 5, 1."""


@dataclass(frozen=True)
class Landscape:
    """A loss and its gradient g_t at θ − t · lr · g for several t."""

    points: Tensor
    """t, (T,)."""
    loss: Tensor
    """(T,)."""
    gradient_distance: Tensor
    """√(mean (g − g_t)²) over all parameters, (T,): gradient predictiveness."""
    cosine: Tensor
    """Of g and g_t, (T,): gradient similarity."""
    smoothness: float
    """max_{t > 0} ‖g − g_t‖₂ / (t · lr · ‖g‖₂): effective smoothness; 0 where g is 0."""
    flips: Tensor | None = None
    """Mean |sign A − sign A_t| of the coefficients A of the relaxed network in its input, (T,)."""

    @property
    def variation(self) -> float:
        """Largest less smallest loss along the step."""
        return float(self.loss.max() - self.loss.min())


@door
def loss_landscape(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    lr: float,
    points: Sequence[float] = POINTS,
    coefficients: Callable[[nn.Module], Tensor] | None = None,
) -> Landscape:
    """Probe a loss along one plain gradient step (not the optimiser's), on a copy of the model.

    Args:
        loss: a scalar of a model, in the mode it has.
        lr: length of the step with t = 1, in units of the gradient.
        points: the t.
        coefficients: something of the model whose change of signs is counted, such as the coefficients of a
            relaxation.

    Raises:
        ValueError: lr or points that are not ≥ 0.
    """
    if lr <= 0 or min(points) < 0:
        raise ValueError(f"a step needs lr > 0 and points ≥ 0, given {lr} and {list(points)}")
    with own_inputs(model):
        probe = copy.deepcopy(model)
    weights = [parameter for parameter in probe.parameters() if parameter.requires_grad]
    start = [weight.detach().clone() for weight in weights]

    def at_present() -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            value = loss(probe)
            parts = torch.autograd.grad(value, weights, allow_unused=True, materialize_grads=True)
        return value.detach(), torch.cat([part.flatten() for part in parts])

    _, gradient = at_present()
    steps = gradient.split([weight.numel() for weight in weights])
    losses, gradients, signs = [], [], []
    for point in points:
        with torch.no_grad():
            for weight, first, step in zip(weights, start, steps, strict=True):
                weight.copy_(first - point * lr * step.view_as(first))
        value, here = at_present()
        losses.append(value)
        gradients.append(here)
        if coefficients:
            signs.append(coefficients(probe).detach().sign())
    every, t = torch.stack(gradients), torch.tensor(list(points), dtype=gradient.dtype)
    distance = (every - gradient).norm(dim=1).cpu()
    length = gradient.norm().cpu()
    moved = t > 0
    smoothness = (distance[moved] / (t[moved] * lr * length)).max() if moved.any() and length > 0 else 0.0
    return Landscape(
        t,
        torch.stack(losses).cpu(),
        distance / len(gradient) ** 0.5,
        torch.cosine_similarity(every, gradient[None], dim=1).cpu(),
        float(smoothness),
        torch.stack([(sign - signs[0]).abs().mean() for sign in signs]).cpu() if signs else None,
    )


def relaxed_margins(model: nn.Module, y: Tensor, region: Region, x: Tensor, method: BoundMethod) -> LinearBound:
    """The margins' linear functions of the input by crown-ibp or one-step, (N, K−1) of them."""
    graph = trace(model, x)
    if method.method == "one-step":
        done = sweep(graph, region, one_step_slopes(graph, region, y, method.seed))
    else:
        done = sweep(graph, region, slopes_by(method.relaxation, method.seed))
    last = len(graph.nodes)
    return backward(graph, done.relaxations, last, margin_rows(y, graph.shape(last)[0], x.dtype))


@door
@torch.no_grad()
def relaxation_tightness(
    model: nn.Module, x: Tensor, y: Tensor, threat: Threat, relaxations: Sequence[BoundMethod]
) -> pd.DataFrame:
    """How tight relaxations are on a model, one row per example and relaxation.

    Columns: ``relaxation``; ``loss``, the cross-entropy of the worst margins; ``total``, the sum of the margins'
    lower bounds, and its four parts ``centre`` (A · centre of the box), ``radius`` (−|A| · its radius),
    ``activations`` and ``biases``. Interval bounds (``ibp``) have a total alone.

    Args:
        x, y: (N, ...), (N,).
        relaxations: with method ibp, crown-ibp or one-step.
    """
    y = check_inputs(x, y, threat)
    region, parts = region_of(x, threat), []
    with frozen_eval(model):
        for method in relaxations:
            row: dict[str, Tensor] = {}
            if method.method == "ibp":
                margins = interval_margins(trace(model, x), region, y).lower
            else:
                bound = relaxed_margins(model, y, region, x, method)
                centre = torch.bmm(bound.coefficients.flatten(2), region.box.centre.flatten(1)[:, :, None])[:, :, 0]
                radius = region.minimum(bound.coefficients).lower - centre
                margins = bound.minimum(region).lower
                pieces = (centre, radius, bound.of_activations, bound.of_biases)
                row = dict(zip(("centre", "radius", "activations", "biases"), pieces, strict=True))
            row = {"total": margins} | row
            table = pd.DataFrame({name: values.sum(1).cpu().numpy() for name, values in row.items()})
            table.insert(0, "loss", robust_cross_entropy(margins).cpu().numpy())
            table.insert(0, "example", range(len(table)))
            table.insert(0, "relaxation", label(method))
            parts.append(table)
    return pd.concat(parts, ignore_index=True)


def label(method: BoundMethod) -> str:
    """A method in a word or two."""
    rule = f" {method.relaxation}" if method.method == "crown-ibp" else ""
    return method.method + rule
