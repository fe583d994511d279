"""What the steps of a training share: a trace that is made once, and singular vectors that go on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import images, small_cnn
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from holdfast import Threat
from holdfast.bounds import batch_statistics, trace
from holdfast.bounds import carried as module
from holdfast.bounds.ball import cut_balls
from holdfast.bounds.carried import Carried, carrying, trace_step
from holdfast.bounds.gains import certified_gains, estimated_gains
from holdfast.bounds.operators import UnsupportedOperator, run
from holdfast.bounds.region import region_of
from holdfast.layers import AOLConv2d, MaxMin
from holdfast.objectives import BCP, Progress


class Scaled(nn.Module):
    """Its forward reads a number that may change, and functions of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.factor = nn.Linear(64, 4), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(1)).relu() * self.factor


class Computed(nn.Module):
    """Its forward computes with weights itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 64))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.flatten(1), 2 * self.weight)


def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "batch norm": small_cnn(),
        "lipschitz": nn.Sequential(AOLConv2d(1, 2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)),
        "parametrised": nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(64, 4))),
        "functions": Scaled(),
        "computed": Computed(),
        "in its own module": nn.Sequential(
            nn.Flatten(), nn.Sequential(nn.Linear(64, 8), nn.ReLU()), nn.Linear(8, 4)
        ),
    }


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize("name", networks())
def test_a_later_step_sees_the_weights_of_the_moment(name: str) -> None:
    model, (x, _), carried = networks()[name].train(), images(), Carried()
    for _ in range(3):
        with batch_statistics(model) as statistics:
            model(x)
        with carrying(carried):
            graph = trace_step(model, x, statistics)
        expected = trace(model, x, statistics)
        assert torch.equal(run(graph, x), run(expected, x))
        assert [node.path for node in graph.nodes] == [node.path for node in expected.nodes]
        gradients = [
            torch.autograd.grad(run(each, x).sum(), list(model.parameters()), allow_unused=True, retain_graph=True)
            for each in (graph, expected)
        ]
        for one, other in zip(*gradients, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
        moved(model)


def test_a_trace_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, original = [], module.traced
    monkeypatch.setattr(module, "traced", lambda *args: made.append(1) or original(*args))
    (x, _), carried = images(), Carried()
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for _ in range(3):
        carried.trace(model, x, {})
    assert len(made) == 1
    carried.trace(model, torch.cat([x, x], 3), {})  # of another size
    assert len(made) == 2
    made.clear()
    model = nn.Sequential(AOLConv2d(1, 2), MaxMin(), nn.Flatten(), weight_norm(nn.Linear(128, 4)))
    for _ in range(3):
        run(carried.trace(model, x, {}), x)
        moved(model)
    assert len(made) == 1
    own = Scaled()
    for _ in range(3):  # a forward of somebody's own may hang on anything
        carried.trace(own, x, {})
    assert len(made) == 4


def test_what_changed_beside_the_weights_is_traced_again() -> None:
    (x, _), carried, model = images(), Carried(), Scaled()
    carried.trace(model, x, {})
    model.factor = 3.0
    assert torch.equal(run(carried.trace(model, x, {}), x), model(x))
    model.inner = nn.Linear(64, 4)
    assert torch.equal(run(carried.trace(model, x, {}), x), model(x))


class Tempered(nn.Module):
    """Its forward reads a buffer as a number, settings out of a dictionary and a list, and a function."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 4)
        self.register_buffer("temperature", torch.ones(()))
        self.settings, self.factors, self.function = {"scale": 1.0}, [1.0], torch.relu

    def forward(self, x: Tensor) -> Tensor:
        scale = self.settings["scale"] * self.factors[0] * float(self.temperature)
        return self.function(self.inner(x.flatten(1))) * scale


CHANGES: dict[str, Callable[[Tempered], object]] = {
    "a buffer": lambda model: model.temperature.fill_(2.0),
    "a dictionary": lambda model: model.settings.update(scale=3.0),
    "a list": lambda model: model.factors.insert(0, 4.0),
    "a function": lambda model: setattr(model, "function", torch.sigmoid),
    "a parameter of a child": lambda model: nn.init.zeros_(model.inner.bias),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("wrap", [lambda model: model, nn.Sequential], ids=["itself", "within"])
def test_whatever_a_forward_reads_is_that_of_the_moment(
    change: Callable[[Tempered], object], wrap: Callable[[nn.Module], nn.Module]
) -> None:
    (x, _), carried, inner = images(), Carried(), Tempered()
    model = wrap(inner)
    for _ in range(2):
        carried.trace(model, x, {})
    change(inner)
    assert torch.equal(run(carried.trace(model, x, {}), x), model(x))


def repeated() -> nn.Sequential:
    torch.manual_seed(0)
    hidden = nn.Linear(64, 64)
    return nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), hidden, nn.Linear(64, 4))


def halved(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output / 2


def hooked(model: nn.Sequential) -> None:
    model[1].register_forward_hook(halved)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.pop(3),  # which stays a module of it
        lambda model: model.insert(2, model[2]),
        lambda model: setattr(model[4], "bias", None),
        lambda model: weight_norm(model[1]),
    ],
    ids=["fewer calls", "more calls", "no bias", "a parametrisation"],
)
def test_whatever_a_network_becomes_is_traced_again(change: Callable[[nn.Sequential], object]) -> None:
    (x, _), carried, model = images(), Carried(), repeated()
    carried.trace(model, x, {})
    change(model)
    assert torch.allclose(run(carried.trace(model, x, {}), x), model(x), atol=1e-6)


@pytest.mark.parametrize(
    "change", [hooked, lambda model: prune.l1_unstructured(model[1], "weight", 0.5)], ids=["a hook", "pruning"]
)
def test_what_bounds_do_not_see_is_refused_in_later_steps_too(change: Callable[[nn.Sequential], object]) -> None:
    (x, _), carried, model = images(), Carried(), repeated()
    carried.trace(model, x, {})
    change(model)
    with pytest.raises(UnsupportedOperator, match="forward hooks"):
        carried.trace(model, x, {})


def test_saved_vectors_follow_the_norms_from_below() -> None:
    torch.manual_seed(0)
    model, (x, _), saved = small_cnn(batch_norm=False), images(), {}
    for step in range(30):
        graph = trace(model, x)
        norms = estimated_gains(graph, x, 10, saved=saved, further=1)
        certified = certified_gains(graph, x)
        assert all(norms[n] <= certified[n] * (1 + 1e-5) for n in norms)
        if step > 10:
            assert all(norms[n] >= 0.95 * certified[n] for n in norms)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.003 * torch.randn_like(parameter)
    fixed = estimated_gains(graph, x, 300)
    assert all(torch.isclose(norms[n], fixed[n], rtol=0.03) for n in norms if not graph.nodes[n].operator.entrywise)


def test_saved_vectors_of_a_layer_that_begins_at_zero_follow_it_from_there() -> None:
    torch.manual_seed(0)
    model, (x, _), saved = small_cnn(batch_norm=False), images(), {}
    nn.init.zeros_(model[0].weight)
    assert estimated_gains(trace(model, x), x, saved=saved)[0] == 0
    nn.init.normal_(model[0].weight)
    for _ in range(60):
        norms = estimated_gains(trace(model, x), x, saved=saved)
    assert norms[0] >= 0.95 * certified_gains(trace(model, x), x)[0]


def test_a_step_of_bcp_makes_few_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    real = nn.functional.conv2d
    monkeypatch.setattr(nn.functional, "conv2d", lambda *a: counts.append(1) or real(*a))
    model, (x, y), threat = small_cnn(batch_norm=False), images(), Threat("l2", 0.3)
    model[5] = nn.Identity()  # without Dropout the clean pass is that of the ball's centre
    carried, made = Carried(), []
    for step in (1, 2, 3):
        counts.clear()
        with carrying(carried):
            BCP(ramp_end=1.0).loss(model, x, y, threat, Progress(step, 4))
        made.append(len(counts))
    assert made[1] == made[2] <= 4  # ball, centre and radius of the box, half of the power iteration
    assert made[0] > made[1] + 8


def test_a_cut_box_is_the_intersection_with_its_gradients() -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 3)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)).double()
    x = images(3)[0].double()
    graph, region = trace(model, x), region_of(x, Threat("l2", 0.4))
    values = cut_balls(graph, region, certified_gains(graph, x), 2)
    operator, box, ball = graph.nodes[0].operator, values[0].box, values[1].centre
    centre, radius = operator.forward(box.centre), operator.absolute(box.radius)
    reach = values[0].radius.view(-1, 1, 1, 1) * operator.row_lengths(x, (1, 8, 8), 2.0)
    low, high = torch.maximum(centre - radius, ball - reach), torch.minimum(centre + radius, ball + reach)
    assert (low > centre - radius).any()
    assert (low < ball).all()
    assert (low > ball - reach).any()
    for found, ends in ((values[1].box, (low, high)), (values[2].box, (low.relu(), high.relu()))):
        assert torch.allclose(found.lower, ends[0])
        assert torch.allclose(found.upper, ends[1])
        sums = [(lower.exp() + upper.sin()).sum() for lower, upper in ((found.lower, found.upper), ends)]
        ours, plain = (torch.autograd.grad(each, list(first.parameters()), retain_graph=True) for each in sums)
        assert all(torch.allclose(one, other) for one, other in zip(ours, plain, strict=True))
