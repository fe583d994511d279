"""Layers and analyses on the device, moved there before or after they were used and built upon."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from device.agreement import agree
from helpers import images, small_cnn
from torch import Tensor, nn

import holdfast.layers
from holdfast import Threat
from holdfast.analysis import (
    compare_simplices,
    jacobian_norm,
    leap_matrix,
    local_lipschitz,
    loss_landscape,
    network_constant,
    neural_collapse,
    relaxation_tightness,
    separation,
)
from holdfast.bounds import BoundMethod
from holdfast.layers import InPieces, LipschitzLayer, Normalize, operator_norm, shared_weights

KINDS = {
    name: kind
    for name, kind in vars(holdfast.layers).items()
    if inspect.isclass(kind) and issubclass(kind, nn.Module) and kind is not LipschitzLayer
}
COUNTED = ("BatchCentering", "FirstChannels", "GroupSort", "Householder", "NActivation", "ZeroChannelConcatenation")
"""Layers that are told a number of channels."""


def made(name: str) -> nn.Module:
    """One that takes and gives eight channels or features."""
    torch.manual_seed(0)
    kind: Any = KINDS[name]
    if kind is Normalize:
        return Normalize([0.5] * 8, [0.2] * 8)
    if kind is InPieces:
        return InPieces(nn.Conv2d(8, 8, 3, padding=1), 1)
    if "Conv" in name or "Linear" in name:
        return kind(8, 8)
    return kind(8) if name in COUNTED else kind()


@pytest.mark.parametrize("moved", ["before", "after"])
@pytest.mark.parametrize("name", sorted(KINDS))
def test_layers(name: str, moved: str) -> None:
    def results(device: str) -> Any:
        layer = made(name)
        dense = "Linear" in name and "Conv" not in name
        x = torch.randn((3, 8) if dense else (3, 8, 6, 6), generator=torch.Generator().manual_seed(1))
        if moved == "before":
            layer.to(device)
        else:  # what it keeps of its weights was made on the CPU
            layer.eval()(x)
            layer.train()(x.clone().requires_grad_(True)).sum().backward()
            layer.zero_grad()
            layer.to(device)
        x = x.to(device).requires_grad_(True)
        with shared_weights():
            trained = layer.train()(x)
        trained.square().sum().backward()
        asked = layer.eval()(x.detach())
        bound = layer.lipschitz_bound() if hasattr(layer, "lipschitz_bound") else 0.0
        return trained, asked, bound, x.grad, [p.grad for p in layer.parameters()]

    agree(results, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("estimate", [False, True])
def test_operator_norms(estimate: bool) -> None:
    def norm(device: str) -> float:
        torch.manual_seed(0)
        layer = nn.Conv2d(4, 6, 3, padding=1, stride=2).to(device)
        return operator_norm(layer, (4, 32, 32), estimate=estimate)

    agree(norm)


def analysed(device: str) -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """A network, images and labels; features and the rows of a last layer."""
    generator = torch.Generator().manual_seed(0)
    x, y = images(40)
    features, rows = torch.rand(40, 8, generator=generator), torch.rand(4, 8, generator=generator)
    model = small_cnn(batch_norm=False).eval()
    return model.to(device), x.to(device), y.to(device), features.to(device), rows.to(device)


METHODS = [BoundMethod(method="crown-ibp"), BoundMethod(method="crown")]
ANALYSES: dict[str, Callable[..., Any]] = {
    "neural collapse": lambda model, x, y, features, rows: neural_collapse(features, y, rows, rows[:, 0]),
    "separation": lambda model, x, y, features, rows: separation(x, y),
    "network constant": lambda model, x, y, features, rows: (
        network_constant(model, x[:2], Threat("l2", 0.1)).verified
    ),
    "jacobian norm": lambda model, x, y, features, rows: jacobian_norm(model, x[:3]),
    "landscape": lambda model, x, y, features, rows: (
        loss_landscape(model, lambda moved: nn.functional.cross_entropy(moved(x), y), 0.1).loss
    ),
    "tightness": lambda model, x, y, features, rows: torch.from_numpy(
        relaxation_tightness(model, x[:3], y[:3], Threat("linf", 0.02), METHODS)[["loss", "total"]].to_numpy()
    ),
    "simplices": lambda model, x, y, features, rows: compare_simplices(rows, rows + features[:4]),
    "leaps": lambda model, x, y, features, rows: leap_matrix(features, y, rows),
    **{
        f"local lipschitz {norm}": lambda model, x, y, features, rows, norm=norm: (
            local_lipschitz(model, x[:4], Threat(norm, 0.1), steps=5, upper=norm != "l1").value
        )
        for norm in ("linf", "l2", "l1")
    },
}


@pytest.mark.parametrize("name", ANALYSES)
def test_analyses(name: str) -> None:
    agree(lambda device: ANALYSES[name](*analysed(device)), rtol=2e-3)


def test_forward_mode_derivatives_and_conjugate_views() -> None:
    def derivatives(device: str) -> Any:
        model, x, *_ = analysed(device)
        values, slopes = torch.func.jvp(model, (x,), (torch.ones_like(x),))
        spectrum = torch.fft.rfft2(x[:, 0])
        return values, slopes, (spectrum.conj() * spectrum).real, (spectrum.mH @ spectrum).abs()

    agree(derivatives, atol=1e-3)
