"""Landscape probes and tightness: the original's numbers, a quadratic in closed form, nothing left behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from helpers import IN_PLACE, images, small_cnn, twins
from torch import Tensor, nn

from holdfast import Threat
from holdfast.analysis import loss_landscape, relaxation_tightness
from holdfast.analysis.loss_landscape import POINTS, relaxed_margins
from holdfast.bounds import BoundMethod, bound_margins, region_of, robust_cross_entropy

INF = math.inf
Nets = dict[str, tuple[nn.Module, dict[str, Tensor]]]
Read = Callable[[str], dict[str, Tensor]]
METHODS = {
    "ibp": BoundMethod(method="ibp"),
    "crownibp": BoundMethod(method="crown-ibp", intersect=False),
    "sameslope": BoundMethod(method="crown-ibp", relaxation="same-slope", intersect=False),
    "zerolb": BoundMethod(method="crown-ibp", relaxation="zero", intersect=False),
}


@pytest.mark.parametrize("name", METHODS)
def test_probes_equal_the_original(certified_nets: Nets, reference: Read, name: str) -> None:
    model, arrays = certified_nets["cnn2_tiny"]
    misc, method = reference("certified_misc"), METHODS[name]
    x, y = arrays["x"].double(), arrays["y"]
    threat = Threat("linf", misc["landscape_eps"].item(), -INF, INF)
    settings = {"relaxation": method.relaxation, "intersect": method.intersect}

    def loss(probe: nn.Module) -> Tensor:
        return robust_cross_entropy(bound_margins(probe, x, y, threat, method.method, **settings)).mean()

    def coefficients(probe: nn.Module) -> Tensor:
        return relaxed_margins(probe, y, region_of(x, threat), x, method).coefficients

    found = loss_landscape(
        model, loss, misc["landscape_lr"].item(), coefficients=None if name == "ibp" else coefficients
    )
    prefix = f"landscape_{name}__"
    assert torch.allclose(found.points, misc["landscape_points"], atol=1e-12)
    assert torch.allclose(found.loss, misc[prefix + "loss"], atol=1e-6)
    assert torch.allclose(found.gradient_distance, misc[prefix + "gradrmse"], atol=1e-6)
    assert torch.allclose(found.cosine, misc[prefix + "cosine"], atol=1e-6)
    if found.flips is not None:
        assert torch.allclose(found.flips, misc[prefix + "asign"], atol=1e-6)
    assert 0 < found.smoothness < INF  # the original's is 0 / 0 at t = 0


def test_a_quadratic_has_its_curvature_as_smoothness() -> None:
    model = nn.Linear(3, 1, bias=False).double()
    curvature = torch.tensor([1.0, 2.0, 4.0]).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 0.0, 1.0]]))

    def loss(probe: nn.Module) -> Tensor:
        return (curvature * probe.weight.square()).sum() / 2

    found = loss_landscape(model, loss, lr=0.1)
    assert found.smoothness == pytest.approx(4)
    t = torch.tensor(POINTS).double()
    assert torch.allclose(found.loss, 2 * (1 - 0.4 * t).square())
    assert torch.equal(model.weight.detach(), torch.tensor([[0.0, 0.0, 1.0]]).double())
    assert model.weight.grad is None
    with pytest.raises(ValueError, match="lr > 0"):
        loss_landscape(model, loss, lr=0.0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_mode_makes_no_difference(mode: Callable[[], AbstractContextManager[None]]) -> None:
    model, (x, y) = small_cnn().eval(), images(4)
    threat, methods = Threat("linf", 0.01), [BoundMethod(method="ibp"), BoundMethod(method="crown-ibp")]

    def loss(probe: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(probe(x), y)

    landscape, tightness = loss_landscape(model, loss, lr=0.1), relaxation_tightness(model, x, y, threat, methods)
    with mode():
        inside = loss_landscape(small_cnn().eval(), loss, lr=0.1)
        assert relaxation_tightness(model, x.numpy(), y.tolist(), threat, methods).equals(tightness)  # type: ignore[arg-type]
    assert torch.equal(inside.loss, landscape.loss)
    assert inside.smoothness == landscape.smoothness
    with pytest.raises(ValueError, match=r"expected a torch\.nn\.Module"):
        loss_landscape(lambda x: x, loss, lr=0.1)  # type: ignore[arg-type]


def test_batch_norm_statistics_are_not_touched() -> None:
    model, (x, y) = small_cnn().train(), images(8)
    before = model[1].running_mean.clone()
    loss_landscape(model, lambda probe: nn.functional.cross_entropy(probe(x), y), lr=0.1)
    assert torch.equal(model[1].running_mean, before)


def test_the_four_parts_are_those_of_the_original(certified_nets: Nets) -> None:
    model, arrays = certified_nets["cnn2_tiny"]
    x, y = arrays["x"].double(), arrays["y"]
    threat = Threat("linf", arrays["eps_linf"][1].item(), -INF, INF)
    table = relaxation_tightness(model, x, y, threat, [METHODS["crownibp"], METHODS["ibp"]])
    crown = table[table["relaxation"] == "crown-ibp adaptive"]
    names = {"centre": "A_x", "radius": "A_norm", "activations": "relu_b", "biases": "other_b"}
    for ours, theirs in names.items():
        expected = arrays[f"linf1__crownibp_adaptive_{theirs}"].sum(1).numpy()
        assert crown[ours].to_numpy() == pytest.approx(expected, abs=1e-9)
    assert crown["total"].to_numpy() == pytest.approx(crown[list(names)].sum(axis=1).to_numpy())
    assert (crown["radius"] <= 0).all()
    interval = table[table["relaxation"] == "ibp"]
    assert interval["total"].to_numpy() == pytest.approx(arrays["linf1__ibp_margin"].sum(1).numpy(), abs=1e-9)
    assert (interval["loss"].to_numpy() >= crown["loss"].to_numpy()).all()


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_model_that_works_in_place_has_the_landscape_of_one_that_does_not(name: str) -> None:
    (hasty, plain), (x, y) = twins(name), images(8)
    before = x.clone()
    found, expected = (
        loss_landscape(model, lambda probe: nn.functional.cross_entropy(probe(x), y), 0.1)
        for model in (hasty.eval(), plain.eval())
    )
    assert torch.equal(x, before)
    assert torch.equal(found.loss, expected.loss)
    assert not hasty._forward_pre_hooks
