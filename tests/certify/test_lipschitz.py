"""Lipschitz certificates: whole networks, pairs of classes, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import images, linear_model, linear_radius
from torch import Tensor, nn

from holdfast import Threat, evaluate
from holdfast.analysis import network_constant
from holdfast.attacks import DDN, PGD
from holdfast.bounds import UnsupportedOperator
from holdfast.certify import LipschitzCertifier
from holdfast.layers import AOLConv2d, AOLLinear, FirstChannels, MaxMin, NormalizedLinear, freeze
from holdfast.models import build

NETWORKS: dict[str, dict[str, object]] = {
    "aol-mlp": {"width": 64, "depth": 3},
    "aol-lcn": {"base_width": 4, "blocks": 2},
    "cpl-lcn": {"base_width": 4, "blocks": 2},
    **{
        f"lipschitz-convnet {layer}": {"layer": layer}
        for layer in ("aol", "bcop", "bro", "cayley", "cpl", "lot", "sll", "soc")
    },
    "lipschitz-convnet normalized": {"layer": "cpl", "normalized_head": True},
    "bronet": {"width": 4, "depth": 2, "features": 16},
    "liresnet": {"width": 4, "depth": 2, "features": 16},
}


def network(name: str) -> nn.Module:
    settings = dict(NETWORKS[name])
    if "convnet" in name:
        settings |= {"blocks": 2, "block_depth": 1}
    torch.manual_seed(0)
    model = build(name.split()[0], input_shape=(1, 8, 8), num_classes=4, **settings)
    with torch.no_grad():  # away from where it starts
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_no_pair_of_points_beats_the_constant_and_no_attack_the_radius(name: str) -> None:
    model, (x, y) = network(name), images(24)
    threat = Threat("l2", 0.3)
    constant = network_constant(model, x[:8], threat)
    assert constant.found <= constant.verified * (1 + 1e-5)
    assert all(layer.found <= layer.verified * (1 + 1e-5) for layer in constant.layers)
    assert len(constant.layers) > 2
    if name not in ("bronet", "liresnet") and "normalized" not in name:  # rows of length 1 are no contraction
        assert constant.verified <= 1.0001
    with torch.no_grad():
        y = model(x).argmax(1)
    certificate = LipschitzCertifier()(model, x, y, threat)
    assert (certificate.radius > 0).all()
    result = DDN(steps=40)(model, x, y, Threat("l2", 3.0))
    assert (result.adversarial_distance.double() >= certificate.radius * (1 - 1e-5)).all()


def test_pairs_of_classes() -> None:
    """min_j (z_y − z_j) / ‖w_y − w_j‖ behind features of constant 1, which a linear model attains."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), NormalizedLinear(6, 3)).double()
    x = torch.rand(20, 1, 2, 3, dtype=torch.float64)
    y = model(x).argmax(1)
    plain = nn.Sequential(nn.Flatten(), model[1].freeze())
    exact = linear_radius(plain, x, y, "l2")
    threat = Threat("l2", 0.01, -math.inf, math.inf)
    found = LipschitzCertifier()(model, x, y, threat).radius
    assert torch.allclose(found, exact, rtol=1e-9)
    cut = nn.Sequential(*model, FirstChannels(3))  # a map that is known by its constant alone
    general = LipschitzCertifier()(cut, x, y, threat).radius
    assert (general <= found).all()


@pytest.mark.parametrize(("norm", "factor"), [("linf", math.sqrt(6)), ("l1", 1.0)])
def test_other_norms_get_what_fits_into_the_ball(norm: str, factor: float) -> None:
    model = linear_model().double()
    x = torch.rand(10, 1, 2, 3, dtype=torch.float64)
    y = model(x).argmax(1)
    wide = [Threat(n, 0.01, -math.inf, math.inf) for n in ("l2", norm)]
    euclidean, other = (LipschitzCertifier()(model, x, y, threat).radius for threat in wide)
    assert torch.allclose(other * factor, euclidean)
    assert (other <= linear_radius(model, x, y, norm) * (1 + 1e-9)).all()


def test_what_has_no_known_constant_is_refused_by_name() -> None:
    class Squares(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x

    x, y = images(4)
    for layer, message in ((nn.LogSigmoid(), "'1'.*LogSigmoid"), (nn.LogSoftmax(1), "Softmax has no Lipschitz")):
        model = nn.Sequential(nn.Flatten(), layer, nn.Linear(64, 4))
        with pytest.raises(UnsupportedOperator, match=message):
            LipschitzCertifier()(model, x, y, Threat("l2", 0.1))
    with pytest.raises(UnsupportedOperator):
        LipschitzCertifier()(nn.Sequential(Squares(), nn.Flatten(), nn.Linear(64, 4)), x, y, Threat("l2", 0.1))
    with pytest.raises(ValueError, match="l0"):
        LipschitzCertifier()(linear_model(4, (1, 8, 8)), x, y, Threat("l0", 1))


def test_a_plain_network_is_certified_by_verified_norms_and_frozen_ones_alike() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(AOLConv2d(1, 4), MaxMin(), nn.Flatten(), AOLLinear(256, 4)).eval()
    x, _ = images(16)
    y = model(x).argmax(1)
    threat = Threat("l2", 0.05)
    own = LipschitzCertifier()(model, x, y, threat)
    plain = LipschitzCertifier()(freeze(model), x, y, threat)
    assert torch.allclose(own.radius, plain.radius, rtol=0.02)  # the norm of the frozen one is computed
    evaluation = evaluate(model, x, y, threat, [PGD(steps=10)], ["lipschitz", "bounds"])
    assert not (evaluation.table["lipschitz.verified"] & evaluation.table["pgd.success"]).any()
