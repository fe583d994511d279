"""Local Lipschitz constants where they are known, and the order of the figures."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import IN_PLACE, Trace, images, linear_model, small_cnn, twins
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from holdfast import Threat
from holdfast.analysis import local_lipschitz
from holdfast.draws import Draws


def test_a_linear_model_in_l_inf_has_its_induced_norm() -> None:
    """max ‖W s‖₁ over sign vectors s, all of which are tried here."""
    for seed in range(4):
        model = linear_model(seed=seed).double()
        weight = model[1].weight.detach()
        signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=6)), dtype=torch.float64)
        exact = (signs @ weight.T).abs().sum(1).max()
        x = torch.rand(5, 1, 2, 3, dtype=torch.float64)
        threat = Threat("linf", 0.05, -math.inf, math.inf)
        found = local_lipschitz(model, x, threat, restarts=40)
        assert torch.allclose(found.value, exact.expand(5), rtol=1e-9)
        assert (found.value <= found.upper).all()
        assert torch.allclose(found.first_order, weight.abs().sum().expand(5))


def test_the_default_restarts_find_what_a_single_one_misses_by_half() -> None:
    """max ‖W s‖₁ over s ∈ {±1}⁶ is max ‖Wᵀ t‖₁ over t ∈ {±1}³, and every s is a corner where ascent may end."""
    model = linear_model(seed=0).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(3, 6, generator=torch.Generator().manual_seed(0)))
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3)), dtype=torch.float64)
    exact = (signs @ model[1].weight.detach()).abs().sum(1).max()
    x = torch.full((20, 1, 2, 3), 0.5, dtype=torch.float64)
    threat = Threat("linf", 0.05)
    one = local_lipschitz(model, x, threat, restarts=1, upper=False).value
    default = local_lipschitz(model, x, threat, upper=False).value
    assert one.min() < 0.5 * exact
    assert default.min() > 0.99 * exact
    assert (default <= exact * (1 + 1e-9)).all()


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_a_single_gradient_in_other_norms(norm: str) -> None:
    model = linear_model(classes=2).double()
    weight = model[1].weight.detach()
    x = torch.rand(3, 1, 2, 3, dtype=torch.float64)
    threat = Threat(norm, 0.1, -math.inf, math.inf)
    found = local_lipschitz(model, x, threat, output_norm=2, restarts=20, steps=100)
    exact = torch.linalg.svdvals(weight)[0] if norm == "l2" else weight.norm(dim=0).max()
    assert (found.value <= exact * (1 + 1e-9)).all()
    assert (found.value >= {"l2": 0.99, "l1": 0.8}[norm] * exact).all()  # l_1 moves one entry at a time


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("on", ["logits", "probabilities", "margins"])
def test_the_order_of_the_figures(norm: str, on: str) -> None:
    model, (x, _) = small_cnn().train(), images(6)
    model[1].eval()
    trace = Trace(model)
    threat = Threat(norm, {"linf": 0.1, "l2": 0.5, "l1": 2.0}[norm])
    found = {
        steps: local_lipschitz(model, x, threat, on=on, steps=steps, restarts=restarts)
        for steps, restarts in [(1, 1), (20, 1), (21, 3)]
    }
    trace.check()
    assert (threat.distance(x, found[20].x) <= threat.eps * (1 + 1e-5)).all()
    assert found[20].x.min() >= 0
    assert (found[20].value >= found[1].value * 0.999).all()
    for one in found.values():
        assert (one.value <= one.upper * (1 + 1e-5)).all()
    assert found[21].value.mean() >= found[20].value.mean() * 0.99
    # The quotient is what it says, at the point that is given.
    with torch.no_grad():
        model.eval()
        logits, moved = model(x), model(found[20].x)
        if on == "probabilities":
            logits, moved = logits.softmax(1), moved.softmax(1)
        if on == "margins":
            own = logits.argmax(1, keepdim=True)
            logits, moved = logits.gather(1, own) - logits, moved.gather(1, own) - moved
        distance = threat.distance(x, found[20].x).clamp(min=1e-3 * threat.eps)
    assert torch.allclose((moved - logits).abs().sum(1) / distance, found[20].value, rtol=1e-3)


def test_it_ascends_where_the_published_estimator_descends() -> None:
    """A hill of known steepness: the best slope from 0 is at the end of the steep part."""

    class Step(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            z = 4 * (x.flatten(1)[:, :1] - 0.5).clamp(-0.1, 0.1)
            return torch.cat([z, -z], 1)

    x = torch.full((3, 1, 1, 2), 0.5)
    found = local_lipschitz(Step(), x, Threat("linf", 0.3))
    assert torch.allclose(found.value, torch.full((3,), 8.0), rtol=1e-4)


def test_the_split_changes_nothing_and_nonsense_is_refused() -> None:
    model, (x, _) = small_cnn(), images(7)
    threat = Threat("linf", 0.05)
    whole = local_lipschitz(model, x, threat, steps=5, restarts=2)
    split = local_lipschitz(model, x, threat, steps=5, restarts=2, batch_size=3)
    assert torch.allclose(whole.value, split.value, rtol=1e-4)
    for options in ({"on": "logit"}, {"output_norm": 3}, {"steps": 0}):
        with pytest.raises(ValueError, match="expected"):
            local_lipschitz(model, x, threat, **options)
    with pytest.raises(ValueError, match="eps > 0"):
        local_lipschitz(model, x, threat.with_eps(0))

    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1).cumsum(1)[:, :3]

    assert local_lipschitz(Odd(), x, threat, steps=2).upper is None
    bare = local_lipschitz(model, x, threat, steps=5, restarts=2, upper=False)
    assert torch.equal(bare.value, whole.value)
    assert bare.first_order is bare.upper is None


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    norm=st.sampled_from(["linf", "l2", "l1"]),
    share=st.floats(0.01, 1.0),
    width=st.integers(1, 12),
    output_norm=st.sampled_from([1, 2]),
    on=st.sampled_from(["logits", "probabilities", "margins"]),
)
def test_the_ascent_grows_and_stays_below_the_certified_bound(
    seed: int, norm: str, share: float, width: int, output_norm: int, on: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x = torch.rand(3, 1, 2, 3, generator=generator, dtype=torch.float64)
    threat = Threat(norm, share * {"linf": 0.5, "l2": 1.0, "l1": 2.0}[norm])
    more = {"output_norm": output_norm, "on": on}
    one = local_lipschitz(model, x, threat, steps=1, restarts=1, seed=seed, **more)
    many = local_lipschitz(model, x, threat, steps=1, restarts=3, seed=seed, **more)
    assert (many.value >= one.value - 1e-9).all()
    long = local_lipschitz(model, x, threat, steps=12, restarts=3, seed=seed, **more)
    for found in (one, many, long):
        assert found.upper is not None
        assert (found.value <= found.upper * (1 + 1e-9)).all()
        assert (threat.distance(x, found.x) <= threat.eps * (1 + 1e-9)).all()
    # What is found is no less than at the points from which it starts.
    drawn = threat.project(x, x + 0.01 * (threat.random_point(x, Draws.of(seed, range(3), 51, 0)) - x))
    with torch.no_grad():
        here, there = model(x), model(drawn)
    if on == "probabilities":
        here, there = here.softmax(1), there.softmax(1)
    if on == "margins":
        own = model(x).argmax(1, keepdim=True)
        here, there = (z.gather(1, own) - z for z in (here, there))
    length = threat.distance(x, drawn).clamp(min=1e-3 * threat.eps)
    start = torch.linalg.vector_norm(there - here, output_norm, dim=1) / length
    assert (one.value >= start * (1 - 1e-9) - 1e-9).all()


def test_rounding_makes_no_slope() -> None:
    """Logits a thousand times larger than what the network can change within eps."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    with torch.no_grad():
        model[1].weight.copy_(5e-4 * torch.randn(10, 3072, generator=generator))
        model[1].bias.copy_(20 * torch.randn(10, generator=generator))
    exact = torch.linalg.svdvals(model[1].weight.double())[0]
    x = torch.rand(6, 3, 32, 32, generator=generator)
    for eps in (1e-4, 1e-3, 0.1):
        found = local_lipschitz(model, x, Threat("l2", eps), output_norm=2, steps=20)
        assert (found.value <= exact * (1 + 1e-5)).all()
        assert found.upper is not None
        assert (found.value <= found.upper).all()
    assert found.value.min() > 0.9 * exact
    with pytest.raises(ValueError, match="no examples"):
        local_lipschitz(model, x[:0], Threat("l2", 0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", IN_PLACE)
def test_a_model_that_works_in_place_is_as_steep_as_one_that_does_not(name: str, dtype: torch.dtype) -> None:
    (hasty, plain), x = (model.to(dtype) for model in twins(name)), images(4)[0].to(dtype)
    before, threat = x.clone(), Threat("linf", 1e-6)  # so small that rounding matters
    found, expected = local_lipschitz(hasty, x, threat, steps=5), local_lipschitz(plain, x, threat, steps=5)
    assert torch.equal(x, before)
    assert torch.equal(found.value, expected.value)
    assert torch.equal(found.first_order, expected.first_order)
    assert torch.equal(found.x, expected.x)
