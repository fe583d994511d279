"""Trials of registered rules: honest ones pass, lies are refused by name, and every rule of ours is honest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import images
from torch import Tensor, nn

from holdfast import Threat, layers
from holdfast.bounds import (
    Affine,
    Elementwise,
    Interval,
    Monotone,
    Operator,
    Rectifier,
    UnsupportedOperator,
    bound_margins,
    bound_outputs,
    graph,
    interval,
    operators,
    register,
    rules,
    trace,
    trial,
)
from holdfast.bounds.functions import FUNCTIONS
from holdfast.bounds.kinds import RELU
from holdfast.bounds.operators import LipschitzMap, MaxPool, PairwiseMax
from holdfast.bounds.trial import refute
from holdfast.objectives import IBP, Progress

Map = Callable[[Tensor], Tensor]
GENERATOR = torch.Generator().manual_seed(3)
MATRIX = torch.randn(6, 8, generator=GENERATOR)
POSITIVE = torch.rand(300, 400, generator=GENERATOR)
NORM = float(torch.linalg.matrix_norm(MATRIX, 2))
KERNEL = torch.rand(4, 4, 3, 3, generator=GENERATOR)


def with_entry(weight: Tensor, index: tuple[int, ...], entry: float) -> Tensor:
    weight = weight.clone()
    weight[index] = entry
    return weight


def convolve(weight: Tensor) -> Map:
    return lambda x: F.conv2d(x, weight, padding=1)


def leaky(leak: float) -> Map:
    return lambda v: F.leaky_relu(v, leak)


def by_channel(x: Tensor) -> Tensor:
    """PReLU whose slopes differ in size and sign."""
    return torch.relu(x) + torch.linspace(-0.5, 0.5, x.shape[1]).view(1, -1, *[1] * (x.dim() - 2)) * x.clamp(max=0)


def linear(**claims: Any) -> Affine:
    return Affine(lambda x: F.linear(x, MATRIX) + 1, lambda r: F.linear(r, MATRIX.abs()), **claims)


@dataclass(frozen=True)
class Squeeze(Operator):
    """A kind of somebody's own: x / (1 + mean |x|)."""

    reach: float


@operators.apply.register
def _(operator: Squeeze, value: Tensor) -> Tensor:
    return value / (1 + value.abs().mean(1, keepdim=True))


@interval.rule.register
def _(operator: Squeeze, value: Interval) -> Interval:
    largest = operator.reach * torch.maximum(value.lower.abs(), value.upper.abs())
    return Interval(torch.zeros_like(largest), largest)


def pool(size: int, overlap: int | None, function: Map | None = None) -> MaxPool:
    def where(x: Tensor) -> tuple[Tensor, Tensor]:
        return F.max_pool2d(x, size, 1, 0, 1, False, True)  # type: ignore[return-value]

    return MaxPool(function or (lambda x: where(x)[0]), where, overlap)


Case = tuple[Operator, tuple[int, ...]]
HONEST: dict[str, Case] = {
    "erf": (Monotone(torch.erf), (10,)),
    "cubic": (Monotone(lambda x: x + x**3), (4, 3, 3)),
    "cumsum": (Monotone(lambda x: x.cumsum(1)), (100,)),
    "sorted": (Monotone(lambda x: x.sort(1).values), (20,)),
    "logcumsumexp": (Monotone(lambda x: x.logcumsumexp(1)), (20,)),
    "logsumexp": (Monotone(lambda x: x.logsumexp(1, keepdim=True)), (8,)),
    "exp, which overflows": (Monotone(torch.exp), (8,)),
    "log, which has a domain": (Monotone(torch.log), (8,)),
    "floor, without slopes": (Monotone(torch.floor), (8,)),
    "a positive matrix": (Monotone(lambda x: x @ POSITIVE.T), (400,)),
    "a positive kernel": (Monotone(convolve(KERNEL)), (4, 8, 8)),
    "one entry": (Monotone(F.logsigmoid), (1,)),
    "softsign": (Elementwise(F.softsign, (0.0,), 2.0, 1.0), (10,)),
    "hardswish": (Elementwise(F.hardswish, (-3.0, 3.0), 1 / 3, 1.5, (-1.5,)), (4, 4, 4)),
    "mish": (Elementwise(F.mish, (), 0.65, 1.09, (-1.1924,)), (10,)),
    "slopes by channel": (Elementwise(by_channel, (0.0,), 0.0, 1.0, (0.0,)), (6, 4, 4)),
    "leaky ReLU": (Rectifier(leaky(0.1), (0.0,), 0.0, 1.0, leak=0.1), (10,)),
    "a dense layer": (linear(norm=lambda: NORM), (8,)),
    "a scale": (Affine(lambda x: 1 - 3 * x, lambda r: 3 * r, entrywise=True), (8,)),
    "tanh of a matrix": (LipschitzMap(lambda x: F.linear(x, MATRIX).tanh(), NORM), (8,)),
    "softmax": (LipschitzMap(lambda x: x.softmax(1), 0.5), (8,)),
    "max-pooling": (pool(2, 4), (3, 6, 6)),
    "a kind of one's own": (Squeeze(1.0), (8,)),
}
LIES: dict[str, tuple[Operator, tuple[int, ...], str]] = {
    "log-softmax": (Monotone(lambda x: x.log_softmax(1)), (10,), "every input.*falls"),
    "log-softmax of many": (Monotone(lambda x: x.log_softmax(1)), (1000,), "every input"),
    "one negative weight": (Monotone(lambda x: x @ with_entry(POSITIVE, (7, 99), -1e-3).T), (400,), r"\(99,\)"),
    "one negative tap": (Monotone(convolve(with_entry(KERNEL, (1, 2, 0, 0), -0.01))), (4, 8, 8), "falls"),
    "a negative scale": (
        Monotone(lambda x: x * torch.linspace(-0.01, 1, 32).view(1, -1, 1, 1)),
        (32, 6, 6),
        "falls",
    ),
    "less the mean": (Monotone(lambda x: x - 0.5 * x.mean(1, keepdim=True)), (400,), "falls"),
    "less the least": (Monotone(lambda x: x - 0.01 * x.amin((1, 2, 3), keepdim=True)), (16, 16, 16), "falls"),
    "a dip": (Monotone(F.gelu), (5,), "falls"),
    "a narrow dip": (Monotone(lambda x: x - 2.2 * torch.relu(0.05 - (x - 3).abs())), (8,), "falls"),
    "a dip in a domain": (
        Monotone(lambda x: x.log() - 2 * torch.relu(0.05 - (x - 3).abs())),
        (8,),
        "falls",
    ),
    "less a term that overflows": (Monotone(lambda x: x.exp() - 2 * x), (8,), "falls"),
    "ripples": (Monotone(lambda x: x - 1e-3 * torch.sin(3000 * x)), (8,), "falls"),
    "far away": (Monotone(lambda x: torch.where(x > 150, 300 - x, x)), (8,), "falls"),
    "falling steps": (Monotone(lambda x: x - 1.5 * torch.floor(x / 3)), (8,), "falls"),
    "one-hot inputs": (
        Monotone(lambda x: x - 2 * x * ((x != 0).sum(1, keepdim=True) == 1)),
        (8,),
        r"every input.*\(-?0, -?0, -?0",
    ),
    "a pole": (Monotone(lambda x: -1 / x), (8,), "falls"),
    "in place": (Monotone(lambda x: x.relu_()), (8,), "in place"),
    "across the batch": (Monotone(lambda x: x + x.sum(0, keepdim=True)), (8,), "one at a time"),
    "by chance": (Monotone(lambda x: x + torch.rand_like(x)), (8,), "answers"),
    "too curved": (Elementwise(torch.sigmoid, (), 0.09, 0.25), (10,), "curvature"),
    "too steep": (Elementwise(torch.sigmoid, (), 0.0963, 0.24), (10,), "slope of at most 0.24"),
    "a hidden turn": (Elementwise(F.gelu, (), 0.82, 1.13), (6, 4, 4), "to rise or to fall"),
    "a turn elsewhere": (Elementwise(F.gelu, (), 0.82, 1.13, (-0.74,)), (1,), "from -inf to -0.74"),
    "a hidden kink": (Elementwise(F.softsign, (), 1.0, 1.0), (10,), "curvature"),
    "a hidden jump": (Elementwise(lambda x: x + 0.01 * (x > 2), (), 0.0, 1.0), (10,), "curvature|slope"),
    "a jump at a kink": (Elementwise(lambda x: x + 0.5 * (x > 2), (2.0,), 0.0, 1.0), (10,), "slope"),
    "one channel is steeper": (Elementwise(by_channel, (0.0,), 0.0, 0.49), (6, 4, 4), "slope"),
    "entries that meet": (Elementwise(lambda x: x.log_softmax(1), (), 1.0, 1.0), (10,), "one entry alone"),
    "entries that are summed": (Elementwise(lambda x: x.sum(1, keepdim=True), (), 0.0, 1.0), (10,), "shape"),
    "another leak": (Rectifier(leaky(0.1), (0.0,), 0.0, 1.0, leak=0.2), (10,), r"max\(v, 0.2 v\)"),
    "|W| with signs": (Affine(linear().forward, lambda r: F.linear(r, MATRIX)), (8,), r"\|W\| r is at least"),
    "|W| too small": (Affine(linear().forward, lambda r: F.linear(r, 0.99 * MATRIX.abs())), (8,), r"\|W\| r is"),
    "|W| with a bias": (Affine(lambda x: x + 1, lambda r: r + 1), (8,), r"\|W\| is linear"),
    "not affine": (Affine(lambda x: x + 0.01 * x.abs(), lambda r: 1.01 * r), (8,), "affine"),
    "not entry by entry": (linear(entrywise=True), (8,), "reads one"),
    "a small norm": (linear(norm=lambda: 0.97 * NORM), (8,), "norm of at most"),
    "a small constant": (LipschitzMap(lambda x: F.linear(x, MATRIX).tanh(), 0.97 * NORM), (8,), "constant"),
    "softmax, rarely steep": (LipschitzMap(lambda x: x.softmax(1), 0.45), (8,), "constant"),
    "overlapping windows": (pool(2, 3), (3, 6, 6), "3 windows"),
    "averages for maxima": (pool(2, 4, lambda x: F.avg_pool2d(x, 2, 1)), (3, 6, 6), "where its largest"),
    "halves for pairs": (
        PairwiseMax(lambda x: torch.cat([torch.maximum(*x.chunk(2, 1)), torch.minimum(*x.chunk(2, 1))], 1)),
        (8,),
        "neighbouring",
    ),
    "a kind of one's own": (Squeeze(0.3), (8,), "interval rule"),
}


def tried(operator: Operator, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
    value = torch.rand(2, *shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    refute(operator, lambda x: operators.apply(operator, x), value)


@pytest.mark.parametrize("name", HONEST)
def test_honest_rules_pass(name: str) -> None:
    tried(*HONEST[name])


@pytest.mark.parametrize("name", LIES)
def test_lies_are_found(name: str) -> None:
    operator, shape, message = LIES[name]
    with pytest.raises(UnsupportedOperator, match=message):
        tried(operator, shape)


def test_an_operator_that_is_not_its_module_is_refused() -> None:
    with pytest.raises(UnsupportedOperator, match="where the function answers"):
        refute(RELU, F.relu6, torch.rand(2, 5))


def test_a_trial_draws_from_no_generator_but_its_own() -> None:
    before = torch.get_rng_state()
    tried(*HONEST["erf"])
    tried(*HONEST["softmax"])
    assert torch.equal(torch.get_rng_state(), before)


class Sinh(nn.Module):
    """x + s sinh x."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * x.sinh()


class Logarithmic(nn.Module):
    """A log-softmax under a name of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.log_softmax(x, 1)


def plain_sinh(x: Tensor, *, scale: float) -> Tensor:
    return x + scale * x.sinh()


def plain_floor(x: Tensor, least: float | Tensor) -> Tensor:
    return torch.maximum(x, torch.as_tensor(least))


class Calling(nn.Module):
    """A call in a forward."""

    def __init__(self, call: Map, *, exported: bool = False) -> None:
        super().__init__()
        self.call, self.exported = call, exported

    def forward(self, x: Tensor) -> Tensor:
        if self.exported:
            assert isinstance(x, Tensor)
        return self.call(x)


class Own(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return plain_sinh(x, scale=0.5)


def network(middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), middle, nn.Linear(16, 4)).eval()


@pytest.fixture
def lent() -> Iterator[Callable[[Any, Callable[[Any], Operator]], None]]:
    """Registers a rule, and takes it back."""
    kinds: list[Any] = []

    def lend(kind: Any, rule: Callable[[Any], Operator]) -> None:
        register(kind, rule)
        kinds.append(kind)

    yield lend
    for kind in kinds:
        (rules.MODULES if isinstance(kind, type) else FUNCTIONS).pop(kind)
        rules.REGISTERED.discard(kind)
    trial._calls.clear()


Lend = Callable[[Any, Callable[[Any], Operator]], None]
CALLS: dict[str, tuple[Any, nn.Module]] = {
    "a module": (Sinh, Sinh()),
    "a torch function": (torch.erf, Calling(lambda x: torch.erf(x))),
    "a function of torch.nn": (F.logsigmoid, Calling(lambda x: F.logsigmoid(x))),
    "a method": (torch.Tensor.erf, Calling(lambda x: x.erf())),
    "a keyword": (torch.asinh, Calling(lambda x: torch.asinh(input=x))),
    "a function in Python": (plain_sinh, Own()),
    "an exported function": (torch.ops.aten.erf.default, Calling(lambda x: torch.erf(x), exported=True)),
}
ADVICE = {
    "a torch function": "erf",
    "a method": "torch.Tensor.erf",
    "an exported function": "torch.ops.aten.erf.default",
}


@pytest.mark.parametrize("name", CALLS)
def test_what_the_refusal_advises_works(name: str, lent: Lend) -> None:
    kind, middle = CALLS[name]
    model, (x, y), threat = network(middle), images(6), Threat("linf", 0.1)
    with pytest.raises(UnsupportedOperator, match="unknown") as refusal:
        trace(model, x)
    if name in ADVICE:
        assert f"register({ADVICE[name]}, rule)" in str(refusal.value)
    lent(kind, Monotone)
    lower, upper = bound_outputs(model, x, threat)
    margins = bound_margins(model, x, y, threat, "crown")
    for _ in range(10):
        answers = model((x + 0.1 * torch.randn_like(x).sign()).clamp(0, 1))
        assert (lower <= answers + 1e-6).all()
        assert (answers <= upper + 1e-6).all()
        others = torch.tensor([[j for j in range(4) if j != label] for label in y.tolist()])
        assert (margins <= answers.gather(1, y[:, None]) - answers.gather(1, others) + 1e-6).all()


@pytest.mark.parametrize("name", ["module", "function", "method"])
def test_a_rule_that_lies_is_refused_with_its_place_and_kind(name: str, lent: Lend) -> None:
    kind, middle, named = {
        "module": (Logarithmic, Logarithmic(), "'2': the rule registered for Logarithmic"),
        "function": (torch.sin, Calling(lambda x: torch.sin(x)), r"'2' \(sin\): the rule registered for sin"),
        "method": (torch.Tensor.cos, Calling(lambda x: x.cos()), "the rule registered for torch.Tensor.cos"),
    }[name]
    lent(kind, Monotone)
    with pytest.raises(UnsupportedOperator, match=f"{named} does not hold: Monotone has to increase"):
        bound_outputs(network(middle), images(4)[0], Threat("linf", 0.1))
    with pytest.raises(UnsupportedOperator, match=named):  # a second time too
        trace(network(middle), images(4)[0])


def test_a_rule_is_tried_once_for_the_same_weights(lent: Lend, monkeypatch: pytest.MonkeyPatch) -> None:
    count = []
    monkeypatch.setattr(trial, "refute", lambda *args: count.append(args))
    lent(Sinh, Monotone)
    lent(plain_floor, Monotone)
    cubic = Sinh()
    model, (x, _) = network(cubic), images(4)
    for _ in range(2):
        trace(model, x)
    assert len(count) == 1
    with torch.no_grad():
        cubic.scale.fill_(2.0)
    trace(model, x)
    assert len(count) == 2
    trace(network(Sinh()), x)
    assert len(count) == 3
    for bound, expected in ((0.0, 4), (0.0, 4), (1.0, 5), (torch.zeros(16), 6), (torch.ones(16), 7)):
        trace(network(Calling(lambda x, bound=bound: plain_floor(x, bound))), x)
        assert len(count) == expected


def test_weights_that_make_a_rule_a_lie_are_found(lent: Lend) -> None:
    lent(Sinh, Monotone)
    cubic = Sinh()
    model, (x, _) = network(cubic), images(4)
    trace(model, x)
    with torch.no_grad():
        cubic.scale.fill_(-0.1)
    with pytest.raises(UnsupportedOperator, match="registered for Sinh does not hold"):
        trace(model, x)


def test_training_is_spared(lent: Lend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "try_once", None)
    lent(Sinh, Monotone)
    x, y = images(6)
    loss = IBP().loss(network(Sinh()), x, y, Threat("linf", 0.1), Progress.end())
    assert loss.total.isfinite()


def test_a_function_of_the_size_of_the_batch_is_refused(lent: Lend) -> None:
    lent(torch.nextafter, Monotone)
    middle = Calling(lambda x: torch.nextafter(x, torch.ones(2, 16)))
    with pytest.raises(UnsupportedOperator, match="registered for nextafter cannot be tried"):
        trace(network(middle), images(4)[0])


def test_batch_norm_has_a_rule_already() -> None:
    with pytest.raises(ValueError, match="already"):
        register(nn.BatchNorm2d, Monotone)


IMAGE, VECTOR = (4, 6, 6), (8,)
OURS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: nn.Linear(8, 5), VECTOR),
    (lambda: layers.Normalize([0.4] * 4, [0.2, 0.3, 0.1, 0.5]), IMAGE),
    (layers.MaxMin, IMAGE),
    (layers.Abs, VECTOR),
    (lambda: layers.BatchCentering(4), IMAGE),
    *[
        (lambda kind=kind: kind(4, 4, 3), IMAGE)  # type: ignore[misc]
        for kind in (layers.AOLConv2d, layers.BCOPConv2d, layers.LinearResidualConv2d, layers.CPLConv2d)
    ],
    *[
        (lambda kind=kind: kind(4, 4, 3), IMAGE)  # type: ignore[misc]
        for kind in (
            layers.SLLConv2d,
            layers.SOCConv2d,
            layers.BROConv2d,
            layers.CayleyConv2d,
            layers.LOTConv2d,
            layers.SandwichConv2d,
        )
    ],
    *[
        (lambda kind=kind: kind(8, 8), VECTOR)  # type: ignore[misc]
        for kind in (
            layers.AOLLinear,
            layers.BROLinear,
            layers.BjorckLinear,
            layers.CayleyLinear,
            layers.NormalizedLinear,
        )
    ],
    *[
        (lambda kind=kind: kind(8, 8), VECTOR)  # type: ignore[misc]
        for kind in (layers.CPLLinear, layers.SLLLinear, layers.SandwichLinear)
    ],
    (lambda: layers.GroupSort(2), IMAGE),
    (lambda: layers.Householder(4), IMAGE),
    (lambda: layers.NActivation(4), IMAGE),
    (layers.L2NormPool2d, IMAGE),
    (lambda: layers.FirstChannels(3), IMAGE),
    (lambda: layers.ZeroChannelConcatenation(6), IMAGE),
    (lambda: nn.Conv1d(4, 3, 3, padding=1), (4, 9)),
    (lambda: nn.Conv2d(4, 3, 3, 2, 1), IMAGE),
    (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", groups=2), IMAGE),
    (lambda: nn.ConvTranspose1d(4, 3, 3, 2), (4, 5)),
    (lambda: nn.ConvTranspose2d(4, 3, 3, 2), IMAGE),
    (nn.ReLU, IMAGE),
    (lambda: nn.LeakyReLU(0.2), VECTOR),
    (lambda: nn.LeakyReLU(1.5), VECTOR),
    (lambda: nn.ELU(0.7), VECTOR),
    (lambda: nn.ELU(2.0), VECTOR),
    (nn.ReLU6, VECTOR),
    (nn.Hardtanh, VECTOR),
    (nn.Sigmoid, IMAGE),
    (nn.Tanh, VECTOR),
    (nn.SiLU, VECTOR),
    (nn.GELU, IMAGE),
    (lambda: nn.GELU("tanh"), VECTOR),
    (nn.SELU, VECTOR),
    (lambda: nn.CELU(0.7), IMAGE),
    (nn.Mish, IMAGE),
    (nn.Hardswish, VECTOR),
    (nn.Hardsigmoid, VECTOR),
    (nn.Softplus, VECTOR),
    (lambda: nn.Softplus(3.0), VECTOR),
    (lambda: nn.Softmax(1), VECTOR),
    (lambda: nn.LogSoftmax(1), IMAGE),
    (lambda: nn.AvgPool2d(3, 2, 1), IMAGE),
    (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), IMAGE),
    (lambda: nn.MaxPool1d(3, 2, 1), (4, 9)),
    (lambda: nn.MaxPool2d(3, 2, 1), IMAGE),
    (lambda: nn.AvgPool1d(3), (4, 9)),
    (lambda: nn.AdaptiveAvgPool1d(2), (4, 9)),
    (lambda: nn.AdaptiveAvgPool2d(2), IMAGE),
    (nn.Flatten, IMAGE),
    (lambda: nn.Unflatten(1, (2, 4)), VECTOR),
    (nn.Identity, VECTOR),
    (lambda: nn.PixelShuffle(2), IMAGE),
    (lambda: nn.PixelUnshuffle(2), IMAGE),
    (lambda: nn.UpsamplingNearest2d(scale_factor=2), IMAGE),
    (lambda: nn.UpsamplingBilinear2d(scale_factor=2), IMAGE),
    (nn.Dropout, VECTOR),
    (nn.Dropout1d, (4, 9)),
    (nn.Dropout2d, IMAGE),
    (nn.Dropout3d, IMAGE),
    (nn.FeatureAlphaDropout, IMAGE),
    (nn.AlphaDropout, VECTOR),
]


def away(module: nn.Module) -> nn.Module:
    """With parameters and statistics that are not those it starts with."""
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point() and not isinstance(module, layers.Normalize):
                tensor.add_(0.2 * torch.randn(tensor.shape))
    return module.eval()


def test_the_contract_knows_every_module_of_ours() -> None:
    assert {type(make()) for make, _ in OURS} == set(rules.MODULES)


@pytest.mark.parametrize(("make", "shape"), OURS, ids=[type(make()).__name__ for make, _ in OURS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_every_module_rule_of_ours_stands_a_trial(
    make: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    module = away(make()).to(dtype)
    value = torch.rand(2, *shape).to(dtype)
    with torch.no_grad():
        refute(rules.MODULES[type(module)](module), module, value)


class Zoo(nn.Module):
    """Every function of ours that reads one activation, by one of its names each."""

    def __init__(self, *, exported: bool) -> None:
        super().__init__()
        self.exported = exported
        self.norm = nn.BatchNorm2d(4)
        self.slopes, self.rest = nn.PReLU(4), nn.Sequential(nn.LayerNorm(4), nn.RMSNorm(4))
        self.kernel, self.matrix = nn.Parameter(torch.randn(4, 4, 3, 3)), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        if self.exported:
            assert isinstance(x, Tensor)
        h = F.conv2d(torch.cat([x, -x, 2 * x, x / 3], 1), self.kernel, padding=1)
        h = F.leaky_relu(self.norm(h), 0.1) - 0.1
        h = F.silu(F.gelu(torch.sigmoid(h) + torch.tanh(h))) - F.relu6(F.hardtanh(h, -2, 2)).abs()
        h = F.elu(F.selu(h), 0.5) + F.celu(self.slopes(h), 0.5) - F.mish(F.softplus(h))
        h = F.hardswish(h) * 0.5 + F.hardsigmoid(h)
        h = h if self.exported else F.adaptive_max_pool2d(F.interpolate(h, scale_factor=2.0), 8)
        h = F.max_pool2d(h, 3, 1, 1).clamp(-3, 3)
        h = h + self.smooth(h) + self.arranged(h)
        h = F.avg_pool2d(F.dropout(h.permute(0, 1, 3, 2), training=self.training), 2)
        h = torch.relu(h[:, :, 1:]).transpose(2, 3)
        z = F.linear(F.adaptive_avg_pool2d(h, 1).flatten(1) + h.mean((2, 3)), self.matrix) @ self.matrix
        z = torch.addmm(self.matrix[0], z, self.matrix) + torch.rsub(h.amax((2, 3)) + h.amin((2, 3)), 1)
        return self.rest(z.softmax(1) * 2 + z.log_softmax(1))

    def smooth(self, h: Tensor) -> Tensor:
        norm = self.norm
        h = F.batch_norm(h, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        h = F.elu(h.clamp_min(-2.0)) + F.softplus(h.clamp_max(2.0)) - F.hardsigmoid(h)
        return torch.maximum(h, 0.3 * h.flip(1)) - torch.minimum(h, h.flip(2))

    def arranged(self, h: Tensor) -> Tensor:
        first, second = h.split(2, 1)
        h = torch.stack([first, second], 1).sum(1)
        h = F.conv_transpose2d(h.clone(), self.kernel[:2])[:, :, 1:-1, 1:-1]
        h = torch.einsum("nchw,ck->nkhw", F.pad(h, (1, 0), value=0.1)[..., 1:], self.matrix)
        largest, least = torch.max(h, 1, keepdim=True).values, torch.min(h, 1, keepdim=True).values
        return h + torch.constant_pad_nd(h, (0, 1))[..., :-1] + (largest - least).expand(-1, 4, -1, -1)


def test_every_function_rule_of_ours_stands_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """What becomes several operators is not tried; ``called.holds`` is the test of it."""
    asked = set()

    class Noting(dict[Any, Any]):
        def get(self, key: Any, default: Any = None) -> Any:
            asked.add(super().get(key, default))
            return super().get(key, default)

    monkeypatch.setattr(graph, "FUNCTIONS", Noting(FUNCTIONS))
    monkeypatch.setattr(graph, "REGISTERED", {*FUNCTIONS})
    trial._calls.clear()
    for exported in (False, True):
        trace(away(Zoo(exported=exported)), images(4)[0])
    # in test_curved.py and test_attention.py, on intervals where they are defined and do not overflow
    names = ("exp", "log", "sqrt", "rsqrt", "square", "reciprocal", "pow")
    others = {FUNCTIONS[getattr(torch, name)] for name in names} | {FUNCTIONS[F.scaled_dot_product_attention]}
    assert asked - {None} == {*FUNCTIONS.values()} - others
