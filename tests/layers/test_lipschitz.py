"""1-Lipschitz layers: singular values of their Jacobians, and weights that are never stale."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from holdfast.layers import (
    Abs,
    AOLConv2d,
    AOLLinear,
    BatchCentering,
    BCOPConv2d,
    BjorckLinear,
    BROConv2d,
    BROLinear,
    CayleyConv2d,
    CayleyLinear,
    CPLConv2d,
    CPLLinear,
    FirstChannels,
    GroupSort,
    Householder,
    L2NormPool2d,
    LinearResidualConv2d,
    LipschitzLayer,
    LOTConv2d,
    MaxMin,
    NActivation,
    NormalizedLinear,
    SandwichConv2d,
    SandwichLinear,
    SLLConv2d,
    SLLLinear,
    SOCConv2d,
    ZeroChannelConcatenation,
    freeze,
    shared_weights,
)
from holdfast.layers.lipschitz import AffineConv2d

CONVOLUTIONS = [
    *[AOLConv2d, CPLConv2d, SLLConv2d, SOCConv2d, BCOPConv2d, BROConv2d, CayleyConv2d, LOTConv2d],
    SandwichConv2d,
]
DENSE = [AOLLinear, BROLinear, CPLLinear, SLLLinear, CayleyLinear, BjorckLinear, SandwichLinear]
ORTHOGONAL = {SOCConv2d, BCOPConv2d, BROConv2d, BROLinear, CayleyConv2d, CayleyLinear, BjorckLinear}
EVERY = [*CONVOLUTIONS, *DENSE]


def example(kind: type[LipschitzLayer], count: int = 4) -> Tensor:
    shape = (count, 4, 6, 6) if kind in CONVOLUTIONS else (count, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def made(kind: type, widths: tuple[int, int] | None = None, **settings: object) -> LipschitzLayer:
    torch.manual_seed(0)
    widths = widths or ((4, 4) if kind in CONVOLUTIONS else (6, 6))
    layer: LipschitzLayer = kind(*widths, **settings)
    return layer


def trained(
    kind: type, widths: tuple[int, int] | None = None, steps: int = 25, **settings: object
) -> LipschitzLayer:
    """After real steps towards outputs that no 1-Lipschitz layer reaches."""
    layer = made(kind, widths, **settings).train()
    x = example(kind, 8)
    x = x[:, : layer.in_channels] if kind in CONVOLUTIONS else x[:, : layer.in_features]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.3, momentum=0.9)
    for step in range(steps):
        torch.manual_seed(step)
        y = layer(x)
        loss = (y - 3 * torch.randn_like(y)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return layer.eval()


def singular_values(layer: nn.Module, x: Tensor) -> Tensor:
    """Of the Jacobian at each point, in float64 arithmetic on the layer's own outputs; (N, min(in, out))."""
    jacobian = torch.func.vmap(torch.func.jacrev(lambda point: layer(point[None])[0]))(x)
    return torch.linalg.svdvals(jacobian.double().reshape(len(x), layer(x)[0].numel(), -1))


@pytest.mark.parametrize("kind", EVERY)
def test_singular_values_after_training_and_after_a_reload(kind: type) -> None:
    layer = trained(kind)
    again = made(kind)
    again.load_state_dict(layer.state_dict())
    x = example(kind)
    for one in (layer, again.eval()):
        values = singular_values(one, x)
        assert values.max() <= 1 + 1e-5
        assert values.max() <= one.lipschitz_bound() + 1e-6
        assert one.lipschitz_bound() <= 1 + 1e-5
        if kind in ORTHOGONAL:
            assert values.min() >= 1 - 1e-4
    assert torch.equal(layer(x), again(x))


@pytest.mark.parametrize("widths", [(4, 6), (6, 3), (3, 5), (1, 4), (5, 1)])
@pytest.mark.parametrize("kind", EVERY)
def test_any_widths(kind: type, widths: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = kind(*widths).eval()
    shape = (3, widths[0], 5, 5) if kind in CONVOLUTIONS else (3, widths[0])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert layer(x).shape[1] == widths[1]
    values = singular_values(layer, x)
    assert values.max() <= 1 + 1e-5
    if kind in ORTHOGONAL and kind is not SOCConv2d:
        assert values.min() >= 1 - 1e-4


@pytest.mark.parametrize(
    "kind", [AOLConv2d, SOCConv2d, BCOPConv2d, BROConv2d, CayleyConv2d, LOTConv2d, SandwichConv2d]
)
def test_strides(kind: type) -> None:
    torch.manual_seed(0)
    layer = kind(2, 8, stride=2).eval()
    x = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    assert layer(x).shape == (2, 8, 3, 3)
    values = singular_values(layer, x)
    assert values.max() <= 1 + 1e-5
    if kind in ORTHOGONAL:
        assert values.min() >= 1 - 1e-4


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("kind", [AOLConv2d, CPLConv2d, SLLConv2d, SOCConv2d, BCOPConv2d])
@pytest.mark.parametrize("kernel_size", [1, 5])
def test_paddings_and_kernels(kind: type, padding_mode: str, kernel_size: int) -> None:
    torch.manual_seed(0)
    layer = kind(3, 3, kernel_size, padding_mode=padding_mode).eval()
    x = torch.randn(2, 3, 7, 6, generator=torch.Generator().manual_seed(1))
    assert layer(x).shape == x.shape
    assert singular_values(layer, x).max() <= 1 + 1e-5
    assert layer.lipschitz_bound() <= 1 + 1e-5


@pytest.mark.parametrize("kind", EVERY)
def test_a_bad_setting_is_refused(kind: type) -> None:
    with pytest.raises((ValueError, TypeError)):
        kind(0, 4)
    if kind in CONVOLUTIONS:
        with pytest.raises(ValueError, match="odd"):
            kind(4, 4, 2)
        with pytest.raises(ValueError, match="reflect"):
            kind(4, 4, padding_mode="reflect")
    if kind in (CPLConv2d, SLLConv2d):
        with pytest.raises(ValueError, match="stride"):
            kind(4, 4, stride=2)


# -- Never stale --------------------------------------------------------------------------------------------------


def edited_in_place(layer: nn.Module, other: nn.Module) -> nn.Module:
    with torch.no_grad():
        for mine, new in zip(layer.parameters(), other.parameters(), strict=True):
            mine.copy_(new)
    return layer


def edited_through_data(layer: nn.Module, other: nn.Module) -> nn.Module:
    for mine, new in zip(layer.parameters(), other.parameters(), strict=True):
        mine.data.copy_(new)  # which no version counter sees
    return layer


def replaced_data(layer: nn.Module, other: nn.Module) -> nn.Module:
    for mine, new in zip(layer.parameters(), other.parameters(), strict=True):
        mine.data = new.data.clone()
    return layer


def loaded(layer: nn.Module, other: nn.Module) -> nn.Module:
    layer.load_state_dict(other.state_dict())
    return layer


def averaged(layer: nn.Module, other: nn.Module) -> nn.Module:
    average = torch.optim.swa_utils.AveragedModel(layer, avg_fn=lambda old, new, count: new)
    average(example(EVERY[0]) if isinstance(layer, AffineConv2d) else _input(layer))
    average.update_parameters(layer)
    average.update_parameters(other)
    inner: nn.Module = average.module
    return inner


def copied_first(layer: nn.Module, other: nn.Module) -> nn.Module:
    twin = copy.deepcopy(layer)
    edited_in_place(layer, other)  # the copy must not follow
    before = {name: value.clone() for name, value in twin.state_dict().items()}
    twin(_input(twin))
    assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())
    return edited_in_place(twin, other)


def _input(layer: nn.Module) -> Tensor:
    return example(type(layer))  # type: ignore[arg-type]


CHANGES: list[Callable[[nn.Module, nn.Module], nn.Module]] = [
    edited_in_place,
    edited_through_data,
    replaced_data,
    loaded,
    averaged,
    copied_first,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", EVERY)
def test_no_change_of_weights_goes_unseen(kind: type, change: Callable[..., nn.Module]) -> None:
    layer, other = made(kind).eval(), trained(kind, steps=3)
    x = example(kind)
    with torch.no_grad():
        before = layer(x)
        changed = change(layer, other)
        assert torch.allclose(changed.eval()(x), other(x), atol=1e-6)
        assert not torch.allclose(before, other(x), atol=1e-3)


@pytest.mark.parametrize("kind", EVERY)
def test_another_type_after_a_forward(kind: type) -> None:
    layer, x = made(kind).eval(), example(kind)
    with torch.no_grad():
        single = layer(x)
        double = layer.double()(x.double())
    assert double.dtype == torch.float64
    assert torch.allclose(single.double(), double, atol=1e-4)


@pytest.mark.parametrize("kind", EVERY)
def test_eval_mode_can_be_differentiated_again_and_again(kind: type) -> None:
    layer = made(kind).eval()
    x = example(kind).requires_grad_(True)
    gradients = []
    for _ in range(2):
        layer.zero_grad()
        layer(x).square().sum().backward()
        gradients.append(layer.weight.grad.clone())
    assert torch.equal(*gradients)
    layer.requires_grad_(False)
    with torch.inference_mode():  # what is kept from here must not spoil the next gradient
        layer(x.detach())
    first = torch.autograd.grad(layer(x).sum(), x)[0]
    assert torch.equal(first, torch.autograd.grad(layer(x).sum(), x)[0])


@pytest.mark.parametrize("kind", EVERY)
def test_a_reparametrised_weight_is_followed(kind: type) -> None:
    class Twisted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.0))

        def forward(self, weight: Tensor) -> Tensor:
            return weight + self.scale * weight.roll(1, 0)

    layer, x = made(kind).eval(), example(kind)
    parametrize.register_parametrization(layer, "weight", Twisted())
    with torch.no_grad():
        before = layer(x)
        layer.parametrizations.weight[0].scale.fill_(0.7)
        assert not torch.allclose(layer(x), before, atol=1e-3)
        assert torch.equal(layer(x), copy.deepcopy(layer)(x))
    assert singular_values(layer, x).max() <= 1 + 1e-5


@pytest.mark.parametrize("kind", EVERY)
def test_what_is_kept_has_no_history_and_full_precision(kind: type) -> None:
    layer, fresh, x = made(kind).eval(), made(kind).eval(), example(kind)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), fresh(x))
    layer.requires_grad_(False)
    points = x.clone().requires_grad_(True)
    for _ in range(2):
        layer(points).sum().backward()


@pytest.mark.parametrize("kind", EVERY)
def test_tangents_of_parameters(kind: type) -> None:
    layer, x = made(kind).eval(), example(kind)
    with torch.no_grad():
        layer(x)  # something is kept now
    values = {name: value.detach() for name, value in layer.named_parameters()}
    draws = {
        name: torch.randn(value.shape, generator=torch.Generator().manual_seed(3)) for name, value in values.items()
    }

    def output(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,))

    if kind in (CPLConv2d, CPLLinear):  # whose norm is a constant in eval mode
        draws["weight"] = torch.zeros_like(draws["weight"])
    _, tangent = torch.func.jvp(output, (values,), (draws,))
    step = 1e-3
    above, below = (output({n: v + sign * step * draws[n] for n, v in values.items()}) for sign in (1, -1))
    difference = (above - below) / (2 * step)
    assert (tangent - difference).norm() <= 0.05 * difference.norm() + 1e-3


@pytest.mark.parametrize(
    "kind", [BjorckLinear, BCOPConv2d, BROConv2d, BROLinear, CayleyLinear, CayleyConv2d, SandwichLinear]
)
@pytest.mark.parametrize("scale", [0.0, 1e-8, 1e12])
def test_weights_of_any_size_give_numbers(kind: type, scale: float) -> None:
    layer = made(kind).eval()
    with torch.no_grad():
        layer.weight.mul_(scale)
    assert layer(example(kind)).isfinite().all()
    assert layer.lipschitz_bound() <= 1 + 1e-5


@pytest.mark.parametrize("kind", EVERY)
def test_transforms_of_torch_func(kind: type) -> None:
    """What is derived first, or looked up again, within a transform serves outside as well."""
    fresh, layer, x = (
        made(kind).eval().requires_grad_(False),
        made(kind).eval().requires_grad_(False),
        example(kind),
    )
    for _ in range(2):
        y, tangent = torch.func.jvp(layer, (x,), (x,))
        assert torch.equal(layer(x), fresh(x))
        assert torch.allclose(y, fresh(x), atol=1e-6)
    points = x.clone().requires_grad_(True)
    cotangent = torch.ones_like(y)
    gradient = torch.autograd.grad(layer(points), points, cotangent)[0]
    assert torch.allclose((tangent * cotangent).sum(), (gradient * x).sum(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", EVERY)
def test_evaluation_derives_once_and_training_every_time(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = made(kind), example(kind)
    calls = []
    original = layer.derive
    monkeypatch.setattr(layer, "derive", lambda size=None: calls.append(size) or original(size))
    layer.eval()
    with torch.no_grad():
        for _ in range(3):
            layer(x)
    assert len(calls) == 1
    calls.clear()
    layer.train()
    layer(x), layer(x)
    assert len(calls) == 2
    calls.clear()
    with shared_weights():
        total = layer(x).square().mean() + layer(2 * x).square().mean()
    assert len(calls) == 1
    total.backward()  # through both
    assert layer.weight.grad.abs().sum() > 0


def test_shared_weights_follow_an_edit_within_the_step() -> None:
    layer, x = made(AOLLinear).train(), example(AOLLinear)
    with shared_weights():
        first = layer(x)
        with torch.no_grad():
            layer.weight.mul_(torch.rand(6, 6))
        second = layer(x)
    assert not torch.allclose(first, second)
    assert torch.equal(second, layer(x))


@pytest.mark.parametrize("kind", [CPLConv2d, CPLLinear, SOCConv2d])
def test_power_iteration_is_saved_and_goes_on_where_it_was(kind: type) -> None:
    layer, x = made(kind).train(), example(kind)
    for _ in range(3):
        layer(x)
    again = made(kind).train()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), again(x))
    state = torch.get_rng_state()
    made_before = made(kind).train()
    torch.set_rng_state(state)
    made_before(x)
    assert torch.equal(torch.get_rng_state(), state)  # the start vectors are no draws of the global generator


def test_images_of_several_sizes() -> None:
    for kind in (CPLConv2d, BROConv2d, CayleyConv2d, LOTConv2d):
        layer = made(kind)
        for mode in (True, False):
            layer.train(mode)
            for side in (6, 8, 6):
                x = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(side))
                assert layer(x).shape == x.shape
        assert singular_values(layer, x).max() <= 1 + 1e-5


# -- Freezing, activations and the rest ---------------------------------------------------------------------------


def test_freezing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        AOLConv2d(2, 4, (3, 5), padding_mode="circular"),
        MaxMin(),
        AOLConv2d(4, 4, stride=2),
        BCOPConv2d(4, 8, stride=2, bias=False),
        nn.Flatten(),
        BjorckLinear(8, 6),
        AOLLinear(6, 5, bias=False),
        CayleyLinear(5, 5),
        NormalizedLinear(5, 3),
    )
    x = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    x = F.interpolate(x, (4, 4))
    model.eval()
    plain = freeze(model)
    assert not any(isinstance(module, LipschitzLayer) for module in plain.modules())
    assert torch.allclose(model(x), plain(x), atol=1e-6)
    assert isinstance(model[0], AOLConv2d)  # the model given is left alone
    assert type(freeze(model[0])) is nn.Conv2d
    twice = AOLLinear(4, 4)
    assert [type(part) for part in freeze(nn.Sequential(twice, MaxMin(), twice))] == [nn.Linear, MaxMin, nn.Linear]


ACTIVATIONS = [MaxMin(), GroupSort(3), Householder(6), Abs(), NActivation(6), nn.ReLU()]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: type(a).__name__)
def test_activations_keep_lengths(activation: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in activation.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    for shape in ((200, 6), (50, 6, 2, 2)):
        a, b = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
        near = a + 1e-3 * b
        for other in (b, near):
            moved = (activation(a) - activation(other)).flatten(1).norm(dim=1)
            assert (moved <= (a - other).flatten(1).norm(dim=1) * (1 + 1e-4)).all()
    if not isinstance(activation, nn.ReLU):
        values = singular_values(activation, torch.randn(5, 6, generator=generator))
        assert torch.allclose(values, torch.ones_like(values), atol=1e-5)


def test_activations_by_hand() -> None:
    x = torch.tensor([[1.0, 3.0, -2.0, -5.0]])
    assert MaxMin()(x).tolist() == [[3, 1, -2, -5]]
    assert MaxMin()(x[:, :3]).tolist() == [[3, 1, -2]]
    assert torch.allclose(Householder(4)(x), MaxMin()(x), atol=1e-6)  # θ = π / 2
    assert GroupSort(4)(x).tolist() == [[3, 1, -2, -5]]
    n = NActivation(4)
    assert torch.allclose(n(x), torch.tensor([[0.0, 2.0, -1.0, -4.0]]))
    assert torch.allclose(n(torch.full((1, 4), 0.25)), torch.full((1, 4), -0.25))
    with pytest.raises(ValueError, match="5"):
        GroupSort(2)(torch.zeros(1, 5))
    with pytest.raises(ValueError, match="even"):
        Householder(5)


def test_the_rest_is_one_lipschitz() -> None:
    x = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ZeroChannelConcatenation(6)(x)[:, :4], x)
    assert ZeroChannelConcatenation(6)(x)[:, 4:].abs().sum() == 0
    assert ZeroChannelConcatenation(2)(x) is x
    assert FirstChannels(2)(x).shape[1] == 2
    assert torch.allclose(L2NormPool2d()(x).flatten(1), x.flatten(2).norm(dim=2))
    assert L2NormPool2d(2)(x).shape == (3, 4, 3, 3)
    assert torch.allclose(L2NormPool2d(2)(x)[0, 0, 0, 0], x[0, 0, :2, :2].norm())
    centre = BatchCentering(4)
    assert centre(x).mean((0, 2, 3)).abs().max() < 1e-6
    assert torch.allclose(centre.running_mean, 0.1 * x.mean((0, 2, 3)))
    assert torch.allclose(centre.eval()(x), x - centre.running_mean.view(-1, 1, 1))


def test_layers_of_known_constant() -> None:
    torch.manual_seed(0)
    residual = LinearResidualConv2d(4, 4).eval()
    x = torch.randn(1, 4, 8, 8)
    top = singular_values(residual, x).max()
    assert 1 < top <= residual.lipschitz_bound() <= 1.1 * top
    head = NormalizedLinear(5, 3)
    with torch.no_grad():
        head.weight.mul_(7)
    assert torch.allclose(head.effective_weight().norm(dim=1), torch.ones(3))
    with pytest.raises(ValueError, match="equal channels"):
        LinearResidualConv2d(3, 4)
