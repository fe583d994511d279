"""Interval bounds: the reference arrays, closed forms, and soundness by sampling."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import images, linear_model, small_cnn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from holdfast import Threat
from holdfast.attacks import PGD
from holdfast.bounds import bound_margins, bound_outputs
from holdfast.draws import Draws

INF = math.inf
Nets = dict[str, tuple[nn.Module, dict[str, Tensor]]]


@pytest.mark.parametrize("name", ["mlp_tiny", "cnn2_tiny"])
@pytest.mark.parametrize("k", [0, 1])
def test_equals_the_original_implementation(certified_nets: Nets, name: str, k: int) -> None:
    model, arrays = certified_nets[name]
    x, y, eps = arrays["x"].double(), arrays["y"], arrays["eps_linf"][k].item()
    free, boxed = Threat("linf", eps, -INF, INF), Threat("linf", eps)
    lower, upper = bound_outputs(model, x, free)
    assert torch.allclose(lower, arrays[f"linf{k}__ibp_logit_l"], atol=1e-9)
    assert torch.allclose(upper, arrays[f"linf{k}__ibp_logit_u"], atol=1e-9)
    assert torch.allclose(bound_margins(model, x, y, free), arrays[f"linf{k}__ibp_margin"], atol=1e-9)
    bounded = bound_margins(model, x, y, boxed)
    assert torch.allclose(bounded, arrays[f"linf{k}__bounded_ibp_margin"], atol=1e-9)
    assert (bounded <= arrays[f"linf{k}__pgd100_margin"] + 1e-9).all()
    single = bound_margins(model.float(), x.float(), y, boxed, arithmetic=None)
    assert torch.allclose(single.double(), bounded, rtol=1e-4, atol=1e-4)


def test_is_exact_for_a_linear_model() -> None:
    model, eps = linear_model().double(), 0.3
    x = torch.rand(5, 1, 2, 3, dtype=torch.float64)
    lower, upper = bound_outputs(model, x, Threat("linf", eps, -INF, INF))
    reach = eps * model[1].weight.abs().sum(1)
    assert torch.allclose(lower, model(x) - reach)
    assert torch.allclose(upper, model(x) + reach)


LAYERS: dict[str, nn.Module] = {
    "ReLU": nn.ReLU(),
    "ReLU in place": nn.ReLU(inplace=True),
    "LeakyReLU": nn.LeakyReLU(0.2),
    "ELU": nn.ELU(0.7),
    "ReLU6": nn.ReLU6(),
    "Sigmoid": nn.Sigmoid(),
    "Tanh": nn.Tanh(),
    "Softplus": nn.Softplus(),
    "Hardtanh": nn.Hardtanh(),
    "Conv2d": nn.Conv2d(4, 4, 3, 2, 1, groups=2),
    "Conv2d, circular": nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    "Conv2d, dilated": nn.Conv2d(4, 4, 3, dilation=2),
    "BatchNorm2d": nn.BatchNorm2d(4),
    "AvgPool2d": nn.AvgPool2d(3, 2, 1),
    "MaxPool2d": nn.MaxPool2d(2),
    "AdaptiveAvgPool2d": nn.AdaptiveAvgPool2d(3),
    "AdaptiveMaxPool2d": nn.AdaptiveMaxPool2d(2),
    "Dropout": nn.Dropout(0.5),
    "PixelUnshuffle": nn.PixelUnshuffle(2),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_every_layer_is_sound_and_no_looser_than_its_box(layer: nn.Module, norm: str) -> None:
    first = nn.Conv2d(1, 4, 3, padding=1)
    model = nn.Sequential(first, layer, nn.Flatten(), nn.LazyLinear(4)).eval()
    if isinstance(layer, nn.BatchNorm2d):
        layer.running_mean.uniform_(-1, 1)
        layer.running_var.uniform_(0.5, 2)
        nn.init.uniform_(layer.weight, -2, 2)  # a negative scale turns an interval round
    x, y = images(8)
    with torch.no_grad():
        model(x)
    threat = Threat(norm, {"linf": 0.1, "l2": 0.5, "l1": 2.0}[norm])
    lower, upper = bound_outputs(model, x, threat)
    margins = bound_margins(model, x, y, threat)
    for seed in range(40):
        logits = model(threat.random_point(x, Draws.of(seed, range(8))))
        assert (lower - 1e-5 <= logits).all()
        assert (logits <= upper + 1e-5).all()
        others = torch.tensor([[j for j in range(4) if j != label] for label in y.tolist()])
        assert (margins <= logits.gather(1, y[:, None]) - logits.gather(1, others) + 1e-5).all()
    point = bound_outputs(model, x, threat.with_eps(0.0), arithmetic=None)
    assert torch.allclose(point[0], model(x), atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(("linf", "l2", "l1")), st.floats(0, 0.5), st.integers(1, 3))
def test_random_networks_are_never_beaten_by_an_attack(seed: int, norm: str, eps: float, depth: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(1, 1, 3, padding=1), nn.LeakyReLU(0.3), nn.MaxPool2d(3, 1, 1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x, y = torch.rand(3, 1, 8, 8, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2])
    threat = Threat(norm, eps * {"linf": 1, "l2": 4, "l1": 20}[norm])
    margins = bound_margins(model, x, y, threat)
    x_adv = PGD(steps=10)(model, x, y, threat, seed=seed).x_adv
    logits = model(x_adv)
    others = torch.tensor([[1, 2], [0, 2], [0, 1]])
    assert (margins <= logits.gather(1, y[:, None]) - logits.gather(1, others) + 1e-9).all()


def test_float32_and_float64_agree() -> None:
    model, (x, y) = small_cnn().eval(), images(6)
    single = bound_margins(model, x, y, Threat("linf", 0.1), arithmetic=None)
    double = bound_margins(model.double(), x.double(), y, Threat("linf", 0.1))
    assert torch.allclose(single.double(), double, rtol=1e-4, atol=1e-4)


def test_an_unknown_method_names_the_valid_ones() -> None:
    x, y = images(2)
    with pytest.raises(ValueError, match="'ipb' is not a bound method; did you mean 'ibp'"):
        bound_margins(small_cnn(), x, y, Threat("linf", 0.1), method="ipb")
