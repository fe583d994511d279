"""Factories from elsewhere: what they may take, and what is told where one cannot make a model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from holdfast.foreign import no_imports
from holdfast.models import Factory, Model, build

NETS = """
from torch import nn
from holdfast.models import Model

def net(shape=(1, 4, 4), classes=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))

def both(input_shape, num_classes): return net(input_shape, num_classes)
def both_turned(num_classes, input_shape): return net(input_shape, num_classes)
def by_name(*, input_shape, num_classes): return net(input_shape, num_classes)
def whatever(**kwargs): return net(kwargs["input_shape"], kwargs["num_classes"])
def in_order(*args): return net(*args)
def nameless(input_shape, num_classes, /): return net(input_shape, num_classes)
def strange(shape, count, /): return net(shape, count)
def classes(num_classes): return net(classes=num_classes)
def classes_nameless(num_classes, /): return net(classes=num_classes)
def shape(input_shape): return net(input_shape)
def shape_nameless(input_shape, /): return net(input_shape)
def mixed(input_shape, /, num_classes): return net(input_shape, num_classes)
def nothing(): return net()
def optional(depth=3): return net()
def further(num_classes, depth): return net(classes=num_classes)

class Net(nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.inner = net(input_shape, num_classes)
    def forward(self, x): return self.inner(x)

class Classes(Net):
    def __init__(self, num_classes=5): super().__init__((1, 4, 4), num_classes)

class Plain(nn.Module):
    def forward(self, x): return x.flatten(1)[:, :3]

class Mine(Model):
    bias: bool = True
    def network(self, input_shape, num_classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(16, num_classes, bias=self.bias))

def boom(input_shape, num_classes): raise RuntimeError("no such\\nbackbone")
def backbone(depth, width): return net()
def text(num_classes): return "net"
three = 3
made = net()
"""
FITTING = (
    "both both_turned by_name whatever in_order nameless strange classes classes_nameless shape shape_nameless "
    "mixed nothing optional Net Classes Plain Mine"
)


@pytest.fixture(autouse=True)
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "ownnets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("ownnets", None)


@pytest.mark.parametrize("name", FITTING.split())
def test_a_factory_is_given_what_it_takes(name: str) -> None:
    model = build(f"ownnets:{name}", input_shape=(1, 4, 4), num_classes=3)
    assert model(torch.zeros(2, 1, 4, 4)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("boom", "'ownnets:boom' raises RuntimeError: no such backbone"),
        ("backbone", r"'ownnets:backbone' takes \(depth, width\), expected \(input_shape, num_classes\)"),
        ("further", r"takes \(num_classes, depth\)"),
        ("text", "'ownnets:text' returned str, not a module"),
        ("three", "'ownnets:three' is int, not a function that returns a module"),
        ("made", "'ownnets:made' is Sequential, not a function that returns a module"),
        ("absent", "has no 'absent'"),
    ],
)
def test_what_makes_no_model_is_told_in_a_sentence(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build(f"ownnets:{name}", input_shape=(1, 4, 4), num_classes=3)
    assert "\n" not in str(caught.value)


def test_further_arguments_and_settings() -> None:
    further = Model.parse({"name": "ownnets:further", "arguments": {"depth": 2}})
    assert further == Factory(path="ownnets:further", arguments={"depth": 2})
    assert isinstance(further.build((1, 4, 4), 3), nn.Module)
    mine = Model.parse({"name": "ownnets:Mine", "bias": False})
    assert mine.model_dump() == {"name": "ownnets:Mine", "normalize": None, "weights": None, "bias": False}
    assert len(list(mine.build((1, 4, 4), 3).parameters())) == 1
    with pytest.raises(ValueError, match="unknown key 'bas'; did you mean 'bias'"):
        Model.parse({"name": "ownnets:Mine", "bas": False})


def test_who_looks_imports_nothing() -> None:
    Path("ownnets.py").write_text("raise SystemExit")
    with no_imports():
        assert Model.parse({"name": "factory", "path": "ownnets:both"}).short_name == "both"
        assert Model.parse("ownnets:Mine").is_placeholder
    assert "ownnets" not in sys.modules


def test_a_layer_of_ones_own() -> None:
    Path("ownlayers.py").write_text(
        "from holdfast.layers import AOLConv2d\nclass Own(AOLConv2d): pass\nclass Other: pass\n"
    )
    settings = {"input_shape": (1, 8, 8), "num_classes": 2, "blocks": 2, "block_depth": 1}
    model = build("lipschitz-convnet", layer="ownlayers:Own", **settings)
    assert "Own" in {type(module).__name__ for module in model.modules()}
    with pytest.raises(ValueError, match="'ownlayers:Other' is not one of the layers"):
        build("lipschitz-convnet", layer="ownlayers:Other", **settings)
    with pytest.raises(ValueError, match="'aoll' is not one of the layers; did you mean 'aol'"):
        build("lipschitz-convnet", layer="aoll", **settings)
    sys.modules.pop("ownlayers")
