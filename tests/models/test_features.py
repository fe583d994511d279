"""The penultimate features of any module."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from helpers import IN_PLACE, Trace, images, small_cnn, twins
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from holdfast.fold import InBfloat16
from holdfast.layers import AOLLinear, BjorckLinear, CayleyLinear, NormalizedLinear
from holdfast.models import build, features
from holdfast.models.features import collect_layers


def test_they_are_what_the_last_linear_layer_reads() -> None:
    model, (x, _) = small_cnn().eval(), images(5)
    trace = Trace(model)
    found = features(model)(x)
    trace.check()
    assert torch.equal(found.features, model[:6](x))
    assert torch.equal(found.logits, model(x))
    assert found.head is model[6]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_last_means_last_in_the_forward_not_in_the_module() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.body, self.unused = nn.Linear(5, 2), nn.Linear(4, 5), nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).relu())

    model = Backwards()
    assert features(model)(torch.rand(3, 4)).head is model.head


@pytest.mark.parametrize(("name", "width"), [("vgg11-bn", 512), ("preact-resnet18", 512), ("cnn002", 200)])
def test_of_known_networks(name: str, width: int) -> None:
    model = build(name, input_shape=(3, 32, 32), num_classes=3).eval()
    assert features(model)(torch.rand(2, 3, 32, 32)).features.shape == (2, width)


def test_modules_without_a_classifier_are_refused() -> None:
    with pytest.raises(ValueError, match="calls no linear layer"):
        features(nn.ReLU())(torch.rand(2, 3))
    with pytest.raises(ValueError, match="not one vector per example"):
        features(nn.Linear(3, 2))(torch.rand(2, 5, 3))


def test_a_layer_is_read_before_the_next_overwrites_it() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    hasty = nn.Sequential(plain[0], nn.ReLU(inplace=True), plain[2])
    x = torch.randn(8, 6)
    read = collect_layers(hasty, x, ["0"]).layers["0"]
    assert torch.equal(read, collect_layers(plain, x, ["0"]).layers["0"])
    assert read.min() < 0


def test_layers_are_read_from_arrays_and_inside_inference_mode() -> None:
    model, (x, _) = small_cnn().eval(), images(5)
    expected = collect_layers(model, x, ["0"])
    with torch.inference_mode():
        inside = collect_layers(model, x.clone(), ["0"])
    assert not inside.features.is_inference()
    for found in (inside, collect_layers(model, x.numpy(), ["0"])):  # type: ignore[arg-type]
        assert torch.equal(found.features, expected.features)
        assert torch.equal(found.layers["0"], expected.layers["0"])
    with pytest.raises(ValueError, match=r"expected a torch\.nn\.Module"):
        collect_layers(model.forward, x)  # type: ignore[arg-type]


def test_layers_that_give_no_vectors_are_named() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.pair, self.head = nn.ReLU(), Pair(), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.pair(x)
            return self.head(input=self.act(self.act(x)))

    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    x = torch.randn(4, 6)
    assert torch.equal(collect_layers(Twice(), x, head="head").features, x.relu())
    for layer, message in (("act", "more than once"), ("pair", "'pair' gives no tensor"), ("", "not a module")):
        with pytest.raises(ValueError, match=message):
            collect_layers(Twice(), x, [layer])


class Odd(nn.Module):
    """A body of 6 features, a head, and something more that the forward calls."""

    def __init__(self, forward: Callable[..., object], **more: nn.Module) -> None:
        super().__init__()
        self.body, self.head, self.call = nn.Linear(4, 6), nn.Linear(6, 3), forward
        for name, module in more.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> object:
        return self.call(self, self.body(x).relu())


class Normalised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight, dim=1), self.bias)


def with_gate(m: Odd, h: Tensor) -> Tensor:
    logits = m.head(h)
    m.gate(h)
    return logits


HEADED = {
    "keyword": Odd(lambda m, h: m.head(input=h)),
    "an auxiliary classifier of as many classes called last": Odd(with_gate, gate=nn.Linear(6, 3)),
    "a gate called last": Odd(with_gate, gate=nn.Linear(6, 6)),
    "frozen": Odd(lambda m, h: m.head(h)).requires_grad_(False),
    "in bfloat16": Odd(lambda m, h: m.head.to(torch.bfloat16)(h.bfloat16()).float()),
    "under autocast": InBfloat16(Odd(lambda m, h: m.head(h))),
    "a head under autocast": Odd(lambda m, h: m.low(h).float(), low=InBfloat16(nn.Linear(6, 3))),
    "parallel": nn.DataParallel(Odd(lambda m, h: m.head(h))),
    "spectral norm": Odd(lambda m, h: m.normed(h), normed=parametrizations.spectral_norm(nn.Linear(6, 3))),
}


@pytest.mark.parametrize("model", HEADED.values(), ids=HEADED.keys())
@pytest.mark.parametrize("training", [False, True])
def test_the_head_is_the_layer_that_makes_the_logits(model: nn.Module, training: bool) -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    expected = deepcopy(model).train(training)(x)
    found = features(model.train(training))(x)
    assert torch.equal(found.logits, expected)
    assert found.features.shape == (5, 6)
    answer = F.linear(found.features.float(), found.head.weight.float(), found.head.bias.float())
    assert torch.allclose(answer, found.logits, atol=0.02)  # of bfloat16
    assert torch.equal(collect_layers(model, x).features, found.features)


def test_gradients_reach_the_features() -> None:
    x = torch.randn(5, 4)
    found = features(HEADED["keyword"])(x)
    (gradient,) = torch.autograd.grad(found.logits[:, 0].sum(), found.features)
    assert torch.allclose(gradient, found.head.weight[0].expand(5, 6))


LIPSCHITZ = [AOLLinear(6, 3), NormalizedLinear(6, 3), CayleyLinear(6, 3), BjorckLinear(6, 3)]


@pytest.mark.parametrize("layer", LIPSCHITZ, ids=lambda layer: type(layer).__name__)
def test_the_head_of_a_lipschitz_network_has_the_weight_that_is_applied(layer: nn.Module) -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), layer).eval(), torch.randn(5, 4)
    found = features(model)(x)
    assert torch.equal(found.features, model[:2](x))
    assert torch.allclose(found.head(found.features), model(x), atol=1e-5)


def overwritten(m: Odd, h: Tensor) -> Tensor:
    logits = m.head(h)
    h.zero_()
    return logits


HEADLESS = {
    "softmax": Odd(lambda m, h: m.head(h).softmax(1)),
    "temperature": Odd(lambda m, h: m.head(h) / 2),
    "in place": Odd(lambda m, h: m.head(h).mul_(2)),
    "a head of its own": Odd(lambda m, h: m.normed(h), normed=Normalised(6, 3)),
    "weights of another layer": Odd(lambda m, h: h @ m.body.weight[:, :3]),
    "features overwritten": Odd(overwritten),
    "two answers": Odd(lambda m, h: (m.head(h), h)),
}


@pytest.mark.parametrize("model", HEADLESS.values(), ids=HEADLESS.keys())
def test_what_no_linear_layer_makes_is_refused_and_a_name_helps(model: Odd) -> None:
    x = torch.randn(5, 4)
    with torch.no_grad(), pytest.raises(ValueError, match=r"makes its logits, .*; name the head"):
        features(model)(x)
    with pytest.raises(ValueError, match="name the head"):
        collect_layers(model, x)
    if "normed" in dict(model.named_modules()):
        assert collect_layers(model, x, head="normed").features.shape == (5, 6)


def test_a_compiled_model_has_its_features_before_and_after_its_first_pass() -> None:
    inner = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(5, 4)
    whole = torch.compile(inner, backend="eager")
    part = nn.Sequential(torch.compile(inner[:3], backend="eager"), torch.compile(inner[3], backend="eager"))
    for model in (whole, part):
        for _ in range(2):
            assert torch.equal(features(model)(x).features, inner[:3](x))
            model(x)
    for name in ("1", "_orig_mod.1"):
        assert torch.equal(collect_layers(whole, x, [name]).layers[name], inner[1](x))


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_model_that_works_in_place_alters_nobodys_images(name: str) -> None:
    (hasty, plain), (x, _) = twins(name), images(4)
    before, points = x.clone(), x.clone().requires_grad_(True)
    read = features(hasty.eval())
    assert torch.equal(read(x).features, features(plain.eval())(x).features)
    assert read(points).features.requires_grad
    assert torch.equal(x, before)
