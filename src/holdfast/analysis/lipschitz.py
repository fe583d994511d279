"""Lipschitz constants in l_2: verified from above, found from below, layer by layer and of the whole network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from holdfast.bounds.ball import lipschitz_constant
from holdfast.bounds.gains import certified_gains, node_gain
from holdfast.bounds.graph import trace
from holdfast.bounds.operators import Affine, LipschitzMap, apply, computed
from holdfast.draws import Draws
from holdfast.inference import check_inputs, door, frozen_eval
from holdfast.search import Steepest, ascend
from holdfast.threat import Threat


@dataclass(frozen=True)
class LayerConstant:
    """One layer's constant from both sides."""

    path: str
    """Where the layer stands in the module."""
    kind: str
    """Class of the layer."""
    verified: float
    """At least its Lipschitz constant."""
    found: float
    """The largest singular value of its Jacobian that power iteration found at activations of real inputs."""


@dataclass(frozen=True)
class NetworkConstant:
    """The whole network's constant from both sides."""

    layers: list[LayerConstant]
    """Those with weights of their own."""
    verified: float
    """Products over layers and sums over branches: at least the constant of the map from inputs to logits."""
    found: float
    """The largest ‖f(x') − f(x)‖ / ‖x' − x‖ that ascent found, or singular value of the Jacobian."""


@door
def jacobian_norm(
    function: Callable[[Tensor], Tensor], x: Tensor, *, iterations: int = 30, seed: int = 0
) -> Tensor:
    """The largest singular value of the Jacobian at each input by power iteration, from below; (N,).

    Args:
        function: of each example by itself, (N, ...) → (N, ...).
    """
    v = Draws.of(seed, range(len(x)), 41).normal(x[0].numel()).to(x).view_as(x)
    shape = (-1, *[1] * (x.dim() - 1))
    for _ in range(iterations):
        v = v / v.flatten(1).norm(dim=1).clamp(min=1e-30).view(shape)
        image = cast(tuple[Tensor, Tensor], torch.func.jvp(function, (x,), (v,)))[1]
        size = image.flatten(1).to(x).norm(dim=1)
        pull = torch.func.vjp(function, x)[1]
        (v,) = pull(image.detach())
    return size.detach()


def steepest_quotient(model: nn.Module, x: Tensor, threat: Threat, *, steps: int = 50, seed: int = 0) -> Tensor:
    """The largest ‖f(x') − f(x)‖₂ / ‖x' − x‖₂ that ascent over the threat set finds for each input, (N,)."""
    with torch.no_grad():
        logits = model(x)

    def quotient(points: Tensor, rows: Tensor) -> tuple[Tensor, None]:
        moved = (model(points) - logits[rows]).norm(dim=1)
        return moved / (points - x[rows]).flatten(1).norm(dim=1).clamp(min=1e-6), None

    start = threat.random_point(x, Draws.of(seed, range(len(x)), 42))
    rule = Steepest(threat, threat.eps / 10)
    return ascend(quotient, x, rule, steps=steps, start=lambda rows, restart: start[rows]).value


@door
def network_constant(model: nn.Module, x: Tensor, threat: Threat, *, seed: int = 0) -> NetworkConstant:
    """Verified and found constants of a model in eval mode.

    Args:
        x: some real inputs, (N, ...): the search starts at them.
        threat: where the search for the whole network's quotient may go.

    Raises:
        UnsupportedOperator: a layer of unknown constant, by its name.
    """
    check_inputs(x, torch.zeros(len(x), dtype=torch.int64, device=x.device), threat)
    with frozen_eval(model):
        graph = trace(model, x)
        gains = certified_gains(graph, x[:1])
        verified = float(lipschitz_constant(graph, gains, x[:1]))
        modules = dict(model.named_modules())
        layers = []
        with torch.no_grad():
            values = computed(graph, {0: x})
        for number, node in enumerate(graph.nodes):
            module = modules.get(node.path.strip("'"))
            operator = node.operator
            if module is None or not list(module.parameters()) or not isinstance(operator, Affine | LipschitzMap):
                continue
            if isinstance(operator, LipschitzMap):
                above = operator.constant
            else:  # those of the affine end are not among the gains
                above = float(gains[number] if number in gains else node_gain(graph, number, x[:1]))

            def function(v: Tensor, operator: Affine | LipschitzMap = operator) -> Tensor:
                return apply(operator, v)

            below = jacobian_norm(function, values[node.inputs[0]], seed=seed).max()
            layers.append(LayerConstant(node.path.strip("'"), type(module).__name__, above, float(below)))
        slopes = [jacobian_norm(model, x, seed=seed).max(), steepest_quotient(model, x, threat, seed=seed).max()]
    return NetworkConstant(layers, verified, float(max(slopes)))
