"""The copy that a search asks is the model, whatever becomes of the model in between."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import Trace, images, small_cnn
from torch import Tensor, nn

from holdfast import fold
from holdfast.fold import folded, frozen_copy
from holdfast.models import build


def awake(model: nn.Module) -> nn.Module:
    """With BatchNorm statistics and scales that are not those of the start, in eval mode and frozen."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, fold.BATCH_NORMS):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                if module.affine:
                    module.weight.uniform_(-1.5, 1.5)
                    module.bias.normal_(0, 0.3)
    return model.eval().requires_grad_(False)


class Tunable(nn.Module):
    """All that a trace takes for granted: a number, a branch, a submodule, a buffer's function."""

    def __init__(self) -> None:
        super().__init__()
        self.network = small_cnn()
        self.temperature, self.twice = 1.0, False
        self.register_buffer("spread", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        z = self.network(x) * self.temperature / self.spread.sqrt()
        return z + self.network(0.5 * x) if self.twice else z


def norms_in(model: nn.Module) -> int:
    return sum(isinstance(module, fold.BATCH_NORMS) for module in model.modules())


def traces(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules that are traced from now on."""
    seen: list[nn.Module] = []
    traced = fold._traced

    def counted(model: nn.Module):
        seen.append(model)
        return traced(model)

    monkeypatch.setattr(fold, "_traced", counted)
    return seen


@pytest.mark.parametrize(("name", "settings"), [("preact-resnet18", {"width": 4}), ("resnet18", {})])
def test_the_copy_gives_the_models_logits_and_gradients(name: str, settings: dict[str, int]) -> None:
    model = awake(build(name, input_shape=(3, 16, 16), num_classes=5, **settings)).double()
    x = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    copy = folded(model, x)
    assert 0 <= norms_in(copy) < norms_in(model)
    found = []
    for one in (model, copy):
        points = x.clone().requires_grad_(True)
        logits = one(points)
        found.append((logits.detach(), torch.autograd.grad(logits.square().sum(), points)[0]))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layers", ["conv1d", "conv3d", "linear", "no-affine", "no-statistics"])
def test_every_pair_folds(layers: str) -> None:
    norm2 = {"no-affine": {"affine": False}, "no-statistics": {"track_running_stats": False}}.get(layers, {})
    parts, shape = {
        "conv1d": ([nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4)], (2, 9)),
        "conv3d": ([nn.Conv3d(1, 4, 3, bias=False), nn.BatchNorm3d(4)], (1, 5, 5, 5)),
        "linear": ([nn.Linear(6, 4), nn.BatchNorm1d(4)], (6,)),
    }.get(layers, ([nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, **norm2)], (1, 6, 6)))
    model, x = nn.Sequential(*parts, nn.ReLU(), nn.Flatten()), torch.rand(5, *shape)
    model = model.eval() if layers == "no-statistics" else awake(model)
    copy = folded(model, x)
    assert norms_in(copy) == (layers == "no-statistics")
    assert torch.allclose(copy(x), model(x), atol=1e-5)


CHANGES = {
    "weights in place": lambda m: m.network[0].weight.mul_(2),
    "weights by data": lambda m: m.network[0].weight.data.mul_(2),
    "other weights": lambda m: setattr(m.network[0], "weight", nn.Parameter(m.network[0].weight.data * 2)),
    "statistics": lambda m: m.network[1].running_mean.add_(1),
    "statistics of another kind": lambda m: m.spread.fill_(4.0),
    "another layer": lambda m: m.network.__setitem__(0, nn.Conv2d(1, 6, 3, 1, 1).requires_grad_(False)),
    "another activation": lambda m: m.network.__setitem__(2, nn.Sigmoid()),
    "a number": lambda m: setattr(m, "temperature", 3.0),
    "a branch": lambda m: setattr(m, "twice", True),
    "a hook": lambda m: m.network[0].register_forward_hook(lambda module, args, out: out + 1),
    "a layer's setting": lambda m: setattr(m.network[0], "padding_mode", "reflect"),
    "a forward": lambda m: setattr(m, "forward", lambda x: -Tunable.forward(m, x)),
    "a forward inside": lambda m: setattr(m.network, "forward", lambda x: -nn.Sequential.forward(m.network, x)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changed_is_never_served_as_it_was(change: str) -> None:
    model, (x, _) = awake(Tunable()), images(4)
    before = model(x)
    assert torch.allclose(folded(model, x)(x), before, atol=1e-5)
    with torch.no_grad():
        CHANGES[change](model)
    now = model(x)
    assert (now - before).abs().max() > 0.01
    assert torch.allclose(folded(model, x)(x), now, atol=1e-5)


def test_a_model_is_traced_once_though_its_weights_move(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = traces(monkeypatch)
    model, (x, y) = small_cnn().train(), images(6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        with frozen_copy(model, x, passes=5) as copy:
            assert norms_in(copy) == 0
            assert torch.allclose(copy(x), model(x), atol=1e-5)
        assert model.training
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert seen == [model]


def test_few_passes_pay_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, x = traces(monkeypatch), images(6)[0].expand(-1, 3, -1, -1)
    plain, normed = awake(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())), awake(small_cnn(channels=3))
    assert folded(normed, x, 1) is normed
    assert not seen
    assert folded(plain, x, 3) is plain
    assert folded(normed, x, 3) is not normed
    assert folded(plain, x, math.inf) is not plain


def test_the_order_of_one_channel_is_not_changed() -> None:
    plain, (x, _) = awake(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten())), images(6)
    assert folded(plain, x) is plain


def test_a_plan_keeps_no_model_alive() -> None:
    model, (x, _) = awake(Tunable()), images(4)
    folded(model, x)
    gone = weakref.ref(model)
    assert model in fold._plans
    del model
    gc.collect()
    assert gone() is None
    models = [awake(small_cnn()) for _ in range(fold.PLANS + 3)]
    for one in models:
        folded(one, x)
    assert len(fold._plans) <= fold.PLANS


def test_the_model_is_left_as_it_was() -> None:
    model, (x, _) = small_cnn().train(), images(4)
    model[0].weight.requires_grad_(False)
    trace = Trace(model)
    with frozen_copy(model, x, passes=10) as copy:
        copy(x)
    trace.check()
    assert not model._forward_pre_hooks
