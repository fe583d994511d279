"""The penultimate features of any module."""

from __future__ import annotations

import pytest
import torch
from helpers import IN_PLACE, Trace, images, small_cnn, twins
from torch import Tensor, nn

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


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_model_that_works_in_place_alters_nobodys_images(name: str) -> None:
    (hasty, plain), (x, _) = twins(name), images(4)
    before, points = x.clone(), x.clone().requires_grad_(True)
    read = features(hasty.eval())
    assert torch.equal(read(x).features, features(plain.eval())(x).features)
    assert read(points).features.requires_grad
    assert torch.equal(x, before)
