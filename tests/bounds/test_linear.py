"""Linear backward bounds: arrays of the originals and of auto_LiRPA, closed forms, soundness by search."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from helpers import images, linear_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from holdfast import Threat
from holdfast.attacks import PGD
from holdfast.bounds import METHODS, bound_margins, bound_outputs, budget, optimised
from holdfast.bounds.operators import MaxPool
from holdfast.bounds.rules import MODULES
from holdfast.draws import Draws
from holdfast.layers import MaxMin

INF = math.inf
Nets = dict[str, tuple[nn.Module, dict[str, Tensor]]]
Read = Callable[[str], dict[str, Tensor]]
RULES = {"adaptive": "adaptive", "sameslope": "same-slope", "zerolb": "zero", "onelb": "one"}


def free(norm: str, eps: Tensor) -> Threat:
    return Threat(norm, eps.item(), -INF, INF)


@pytest.mark.parametrize("name", ["mlp_tiny", "cnn2_tiny"])
@pytest.mark.parametrize("k", [0, 1])
def test_equals_the_original_implementations(certified_nets: Nets, name: str, k: int) -> None:
    model, arrays = certified_nets[name]
    x, y = arrays["x"].double(), arrays["y"]
    threat = free("linf", arrays["eps_linf"][k])
    published = {"intersect": False}
    for rule, relaxation in RULES.items():
        for kind, method in (("crownibp", "crown-ibp"), ("crown", "crown")):
            margins = bound_margins(model, x, y, threat, method, relaxation=relaxation, **published)
            assert torch.allclose(margins, arrays[f"linf{k}__{kind}_{rule}_margin"], atol=1e-9), (rule, method)
            cut = bound_margins(model, x, y, threat, method, relaxation=relaxation)
            assert (torch.maximum(cut, margins) <= arrays[f"linf{k}__pgd100_margin"] + 1e-9).all()
    cap = bound_margins(model, x, y, threat, "cap", **published)
    assert torch.allclose(cap, arrays[f"linf{k}__cap_dual_margin"], atol=1e-9)
    boxed = Threat("linf", threat.eps)
    cap = bound_margins(model, x, y, boxed, "cap", **published)
    assert torch.allclose(cap, arrays[f"linf{k}__cap_dual_bounded_margin"], atol=1e-9)
    crown_ibp = bound_margins(model, x, y, boxed, "crown-ibp", **published)
    assert torch.allclose(crown_ibp, arrays[f"linf{k}__bounded_crownibp_margin"], atol=1e-9)
    round_ = bound_margins(model, x, y, free("l2", arrays["eps_l2"][k]), "cap", **published)
    assert torch.allclose(round_, arrays[f"l2_{k}__cap_dual_margin"], atol=1e-9)


@pytest.mark.parametrize("name", ["mlp_tiny", "cnn2_tiny"])
@pytest.mark.parametrize("k", [0, 1])
def test_is_no_looser_than_auto_lirpa(certified_nets: Nets, reference: Read, name: str, k: int) -> None:
    model, arrays = certified_nets[name]
    peer = reference(f"certified_{name}_lirpa")
    x, y = arrays["x"].double(), arrays["y"]
    for norm, prefix in (("linf", f"linf{k}"), ("l2", f"l2_{k}")):
        threat = free(norm, arrays[f"eps_{norm}"][k])
        assert (bound_margins(model, x, y, threat, "crown-ibp") >= peer[f"{prefix}__crownibp_margin"] - 1e-9).all()
        assert (bound_margins(model, x, y, threat, "crown") >= peer[f"{prefix}__crown_margin"] - 1e-9).all()
        alpha = bound_margins(model, x, y, threat, "alpha-crown", iterations=60)
        if f"{prefix}__alpha_margin" not in peer:
            continue
        assert (alpha >= peer[f"{prefix}__alpha_margin"] - 0.01 * peer[f"{prefix}__alpha_margin"].abs()).all()
    threat = free("linf", arrays["eps_linf"][k])
    same = bound_margins(model, x, y, threat, "crown-ibp", intersect=False)
    assert torch.allclose(same, peer[f"linf{k}__crownibp_margin"], atol=1e-9)


@pytest.mark.parametrize("k", [0, 1])
def test_gradients_and_upper_bounds_are_those_of_the_original(certified_nets: Nets, k: int) -> None:
    model, arrays = certified_nets["cnn2_tiny"]
    x, y, threat = arrays["x"].double(), arrays["y"], free("linf", arrays["eps_linf"][k])
    margins = bound_margins(model, x, y, threat, "crown-ibp", intersect=False)
    loss = (1 + (-margins).exp().sum(1)).log().mean()
    assert loss.item() == pytest.approx(arrays[f"linf{k}__crownibp_adaptive_rce"].item(), abs=1e-9)
    loss.backward()
    for name, parameter in model.named_parameters():
        expected = arrays[f"linf{k}__crownibp_adaptive_rce_grad__{name}"]
        assert torch.allclose(parameter.grad, expected, atol=1e-9), name
    model.zero_grad()


def test_the_bounds_of_neurons_are_those_of_the_original(certified_nets: Nets) -> None:
    model, arrays = certified_nets["cnn2_tiny"]
    x, threat = arrays["x"].double(), free("linf", arrays["eps_linf"][1])
    for stop, number in ((1, 0), (3, 1), (6, 2)):
        lower, upper = bound_outputs(
            nn.Sequential(*model[:stop], nn.Flatten()), x, threat, "crown", intersect=False
        )
        assert torch.allclose(
            lower.view(8, -1), arrays[f"linf1__crown_adaptive_pre{number}_l"].view(8, -1), atol=1e-9
        )
        assert torch.allclose(
            upper.view(8, -1), arrays[f"linf1__crown_adaptive_pre{number}_u"].view(8, -1), atol=1e-9
        )


class Block(nn.Module):
    """h + f(h) with BatchNorm before each activation."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
        self.convolutions = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)])

    def forward(self, h: Tensor) -> Tensor:
        out = h
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            out = convolution(torch.relu(norm(out)))
        return h + out


LAYERS: dict[str, nn.Module] = {
    "residual block": Block(),
    "ReLU": nn.ReLU(),
    "LeakyReLU": nn.LeakyReLU(0.2),
    "steep LeakyReLU": nn.LeakyReLU(1.7),
    "ELU": nn.ELU(0.7),
    "ReLU6": nn.ReLU6(),
    "Hardtanh": nn.Hardtanh(-0.3, 0.4),
    "Sigmoid": nn.Sigmoid(),
    "Tanh": nn.Tanh(),
    "Softplus": nn.Softplus(2.0),
    "GELU": nn.GELU(),
    "GELU tanh": nn.GELU("tanh"),
    "SiLU": nn.SiLU(),
    "MaxMin": MaxMin(),
    "MaxPool2d": nn.MaxPool2d(2),
    "MaxPool2d, windows that overlap": nn.MaxPool2d(3, 2, 1),
    "AdaptiveMaxPool2d": nn.AdaptiveMaxPool2d(3),
    "Conv2d, strided groups": nn.Conv2d(4, 4, 3, 2, 1, groups=2),
    "Conv2d, dilated": nn.Conv2d(4, 4, 3, dilation=2),
    "Conv2d, circular": nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    "Conv2d, same": nn.Conv2d(4, 4, 4, padding="same"),
    "ConvTranspose2d": nn.ConvTranspose2d(4, 4, 3, 2, 1, output_padding=1),
    "Upsample": nn.Upsample(scale_factor=2, mode="bilinear"),
    "AvgPool2d": nn.AvgPool2d(3, 2, 1),
    "BatchNorm2d": nn.BatchNorm2d(4),
    "PixelUnshuffle": nn.PixelUnshuffle(2),
}


ANY_SIZE = sorted(
    LAYERS.keys() - {"BatchNorm2d", "PixelUnshuffle", "Conv2d, dilated", "MaxPool2d", "AdaptiveMaxPool2d"}
)


def network(layer: nn.Module) -> nn.Module:
    """A convolution, the layer under test, a ReLU and a dense end, at scales where neurons of both kinds occur."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), deepcopy(layer), nn.Flatten(), nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 4)
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, -2, 2)
    with torch.no_grad():
        model(torch.rand(2, 1, 8, 8))
        model[0].weight.mul_(2)
    return model.double().eval()


def violations(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, margins: Tensor) -> float:
    """By how much random points and an attack get below the bounds."""
    others = torch.tensor([[j for j in range(4) if j != label] for label in y.tolist()])
    worst = -INF
    points = [threat.random_point(x, Draws.of(seed, range(len(x)))) for seed in range(30)]
    points += [threat.largest_noise(x, Draws.of(seed, range(len(x)))) for seed in range(10)]
    points.append(PGD(steps=15, loss="margin")(model, x, y, threat).x_adv)
    with torch.no_grad():
        for point in points:
            logits = model(point)
            worst = max(worst, (margins - logits.gather(1, y[:, None]) + logits.gather(1, others)).max().item())
    return worst


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_no_method_is_beaten_on_any_layer(layer: nn.Module, norm: str) -> None:
    model, (x, y) = network(layer), images(6)
    x = x.double()
    threat = Threat(norm, {"linf": 0.05, "l2": 0.3, "l1": 1.0}[norm])
    bounds = {}
    uneven = isinstance(layer, nn.AdaptiveMaxPool2d)  # 8 into 3: windows of several sizes, refused by balls
    for method in METHODS:
        if uneven and method in ("bcp", "lmt"):
            continue
        with torch.no_grad():
            margins = bound_margins(model, x, y, threat, method, iterations=3)
        assert violations(model, x, y, threat, margins) <= 1e-9, method
        exact = bound_margins(model, x, y, threat.with_eps(0.0), method, iterations=1)
        logits = model(x)
        others = torch.tensor([[j for j in range(4) if j != label] for label in y.tolist()])
        assert torch.allclose(exact, logits.gather(1, y[:, None]) - logits.gather(1, others), atol=1e-6), method
        bounds[method] = margins
    assert (bounds["crown-ibp"] >= bounds["ibp"] - 1e-9).all()
    assert (bounds["crown"] >= bounds["ibp"] - 1e-9).all()
    assert (bounds["alpha-crown"] >= bounds["crown"] - 1e-9).all()


class Residual(nn.Module):
    """Pre-activation blocks with BatchNorm, a strided shortcut, a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(6)])
        self.first = nn.Conv2d(4, 6, 3, 2, 1)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.shortcut = nn.Conv2d(4, 6, 1, 2)
        self.dense = nn.Linear(12 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        out = self.first(torch.relu(self.norms[0](h)))
        out = self.second(torch.relu(self.norms[1](out)))
        h = torch.cat([out + self.shortcut(h), out * 0.5], 1)
        return self.dense(torch.relu(h).flatten(1))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_residual_network_is_bounded_soundly_and_linear_bounds_are_tighter(norm: str) -> None:
    torch.manual_seed(1)
    model, (x, y) = Residual().double().eval(), images(6)
    x = x.double()
    for module in model.norms:
        module.running_var.uniform_(0.3, 1)
    threat = Threat(norm, {"linf": 0.03, "l2": 0.2}[norm])
    tightness = {}
    for method in METHODS:
        with torch.no_grad():
            margins = bound_margins(model, x, y, threat, method, iterations=3)
        assert violations(model, x, y, threat, margins) <= 1e-9, method
        tightness[method] = margins.mean()
    assert tightness["ibp"] < tightness["crown-ibp"] <= tightness["crown"] <= tightness["alpha-crown"]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from(("linf", "l2", "l1", "box")),
    st.floats(0, 0.6),
    st.lists(st.sampled_from(ANY_SIZE), min_size=1, max_size=3),
    st.sampled_from([m for m in METHODS if m != "alpha-crown"]),
)
def test_random_networks_regions_and_methods(
    seed: int, norm: str, eps: float, names: list[str], method: str
) -> None:
    torch.manual_seed(seed)
    layers = [layer for name in names for layer in (nn.LazyConv2d(4, 3, padding=1), deepcopy(LAYERS[name]))]
    model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(4)).eval()
    with torch.no_grad():
        model(torch.rand(2, 1, 8, 8))
    model = model.double()
    x, y = torch.rand(3, 1, 8, 8).double(), torch.tensor([0, 1, 2])
    if norm == "box":
        lower, upper = x - eps * torch.rand_like(x), x + eps * torch.rand_like(x)
        margins = bound_margins(model, x, y, (lower, upper), method)
        others = torch.tensor([[1, 2, 3], [0, 2, 3], [0, 1, 3]])
        for _ in range(40):
            logits = model(lower + (upper - lower) * torch.rand_like(x).round(decimals=0 if _ % 2 else 3))
            assert (margins <= logits.gather(1, y[:, None]) - logits.gather(1, others) + 1e-9).all()
        return
    threat = Threat(norm, eps * {"linf": 0.3, "l2": 2, "l1": 10}[norm])
    with torch.no_grad():
        margins = bound_margins(model, x, y, threat, method)
    assert violations(model, x, y, threat, margins) <= 1e-9


CASES = [("linf", "ibp"), ("l2", "bcp"), ("l2", "lmt")]


@pytest.mark.parametrize(
    ("norm", "method"), [*CASES, *((n, m) for n in ("linf", "l2", "l1") for m in ("crown-ibp", "crown", "cap"))]
)
def test_is_exact_for_a_linear_model(norm: str, method: str) -> None:
    model, x = linear_model().double(), torch.rand(5, 1, 2, 3, dtype=torch.float64)
    y = model(x).argmax(1)
    threat = Threat(norm, 0.3, -INF, INF)
    margins = bound_margins(model, x, y, threat, method)
    order = {"linf": 1, "l2": 2, "l1": INF}[norm]
    for row, label in enumerate(y.tolist()):
        others = [j for j in range(3) if j != label]
        difference = model[1].weight[label] - model[1].weight[others]
        logits = model(x[row : row + 1])[0]
        expected = logits[label] - logits[others] - 0.3 * torch.linalg.vector_norm(difference, order, dim=1)
        assert torch.allclose(margins[row], expected, atol=1e-9)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = network(nn.ReLU()), images(5)
    threat = Threat("linf", 0.1)
    whole = bound_margins(model, x.double(), y, threat, "crown")
    monkeypatch.setattr(budget, "PASS", 2000)
    assert torch.allclose(bound_margins(model, x.double(), y, threat, "crown"), whole, atol=1e-12)


def test_single_precision_agrees_with_double() -> None:
    model, (x, y) = network(nn.ReLU()), images(5)
    for method in METHODS:
        threat = Threat("l2", 0.2)
        double = bound_margins(model.double(), x.double(), y, threat, method, iterations=3)
        single = bound_margins(model.float(), x.float(), y, threat, method, iterations=3)
        assert torch.allclose(single.double(), double, rtol=1e-3, atol=1e-3), method


def test_alpha_crown_does_not_hang_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = network(nn.ReLU()), images(6)
    threat, whole = Threat("linf", 0.05), {}
    for limit in (2**26, 20_000, 100):  # all at once; some at a time; the last pass alone
        monkeypatch.setattr(optimised, "LIMIT", limit)
        whole[limit] = bound_margins(model, x.double(), y, threat, "alpha-crown", iterations=5)
        single = [
            bound_margins(model, x[[i]].double(), y[[i]], threat, "alpha-crown", iterations=5) for i in range(6)
        ]
        assert torch.allclose(whole[limit], torch.cat(single), atol=1e-9)
    assert torch.allclose(whole[2**26], whole[20_000], atol=1e-9)
    assert (whole[100] <= whole[2**26] + 1e-9).float().mean() > 0.9


def test_what_makes_no_sense_is_said() -> None:
    model, (x, y) = network(nn.ReLU()), images(3)
    x, threat = x.double(), Threat("l2", 0.1)
    for method in METHODS:
        assert bound_margins(model, x[:0], y[:0], threat, method).shape == (0, 3)
    with pytest.raises(ValueError, match="label 7 does not fit a model of 4 classes"):
        bound_margins(model, x, y * 0 + 7, threat, "crown")
    with pytest.raises(ValueError, match="without a finite box"):
        bound_margins(model, x, y, Threat("l0", 1, -INF, INF), "crown")
    with torch.inference_mode():
        inside = bound_margins(model, x, y, threat, "crown")
    assert torch.equal(inside, bound_margins(model, x, y, threat, "crown"))
    with pytest.raises(ValueError, match="lower ≤ x ≤ upper"):
        bound_margins(model, x, y, (x + 0.1, x + 0.2), "crown")


@pytest.mark.parametrize("method", ["bcp", "lmt"])
def test_balls_are_refused_where_the_lipschitz_constant_is_unknown(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Largest(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.max_pool2d(x, 3, 1, 1)

    def rule(module: nn.Module) -> MaxPool:
        return MaxPool(module, lambda x: F.max_pool2d(x, 3, 1, 1, return_indices=True), None)

    spread = nn.Sequential(Largest(), nn.Flatten(), nn.Linear(36, 2)).double()
    x, y = torch.full((1, 1, 6, 6), 0.5).double(), torch.tensor([0])
    monkeypatch.setitem(MODULES, Largest, rule)
    with pytest.raises(ValueError, match="no Lipschitz constant"):
        bound_margins(spread, x, y, Threat("l2", 0.3), method)


@pytest.mark.parametrize("method", ["bcp", "lmt"])
def test_a_large_bias_does_not_hide_an_operator_norm(method: str) -> None:
    convolution = nn.ConvTranspose2d(1, 1, 1)
    model = nn.Sequential(convolution, nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        convolution.weight.fill_(0.003)
        convolution.bias.fill_(1e5)
        model[2].weight.copy_(torch.tensor([[1.0] * 4, [0.0] * 4]))
        model[2].bias.zero_()
    x = torch.zeros(1, 1, 2, 2)
    bound = bound_margins(model, x, torch.tensor([0]), Threat("l2", 1e4, -INF, INF), method)
    logits = model(x - 5000)
    assert bound.item() <= (logits[0, 0] - logits[0, 1]).item()
