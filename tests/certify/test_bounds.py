"""The bound certifier on the reference networks."""

from __future__ import annotations

import pytest
import torch
from helpers import images, small_cnn
from torch import Tensor, nn

from holdfast import Threat
from holdfast.bounds import bound_margins
from holdfast.certify import BoundCertifier, bounds
from holdfast.component import Component


@pytest.mark.parametrize("name", ["mlp_tiny", "cnn2_tiny"])
@pytest.mark.parametrize("k", [0, 1])
def test_verdicts_are_those_of_the_reference_margins(
    certified_nets: dict[str, tuple[nn.Module, dict[str, Tensor]]], name: str, k: int
) -> None:
    model, arrays = certified_nets[name]
    x, y, threat = arrays["x"].double(), arrays["y"], Threat("linf", arrays["eps_linf"][k].item())
    certificate = BoundCertifier(method="ibp")(model, x, y, threat)
    expected = (arrays[f"linf{k}__bounded_ibp_margin"] > 0).all(1)
    assert torch.equal(certificate.verified, expected)
    assert certificate.guarantee == "deterministic"
    attacked = (arrays[f"linf{k}__pgd100_margin"] > 0).all(1)
    assert not (certificate.verified & ~attacked).any()


def test_the_radius_is_as_fine_as_asked_for(
    certified_nets: dict[str, tuple[nn.Module, dict[str, Tensor]]],
) -> None:
    model, arrays = certified_nets["mlp_tiny"]
    x, y, threat = arrays["x"].double(), arrays["y"], Threat("linf", 0.02)
    coarse = BoundCertifier()(model, x, y, threat).radius
    fine = BoundCertifier(radius_tolerance=1e-6)(model, x, y, threat).radius
    assert ((fine - coarse >= -1e-9) & (fine - coarse <= 0.01 * 0.02)).all()


def test_it_is_a_component() -> None:
    certifier = BoundCertifier(method="ibp")
    assert isinstance(certifier, Component)
    assert certifier.title == "IBP"
    with pytest.raises(ValueError, match="ibp"):
        BoundCertifier(method="ipb")


def test_a_cascade_decides_what_its_last_stage_decides_and_says_by_which() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )
    x, _ = images(40)
    y = model(x).argmax(1)
    threat = Threat("linf", 0.02)
    cascade = BoundCertifier(method="cascade")(model, x, y, threat)
    single = {name: BoundCertifier(method=name)(model, x, y, threat) for name in ("ibp", "crown-ibp", "crown")}
    union = torch.stack([certificate.verified for certificate in single.values()]).any(0)
    assert torch.equal(cascade.verified, union)
    assert single["ibp"].verified.sum() < union.sum()
    for row, name in enumerate(cascade.method or []):
        if cascade.verified[row]:
            assert single[name].verified[row]
    assert cascade.margin is not None
    assert cascade.seconds is not None
    assert (cascade.seconds > 0).all()
    assert torch.equal(cascade.verified, cascade.margin > 0)
    assert (cascade.radius[cascade.verified] >= threat.eps).all()
    parts = [
        BoundCertifier(method="cascade")(model, x[part], y[part], threat) for part in torch.arange(40).split(7)
    ]
    assert torch.equal(cascade.verified, torch.cat([part.verified for part in parts]))


def test_methods_of_l2_certify_in_order_of_their_tightness() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))
    x, _ = images(40)
    y, threat = model(x).argmax(1), Threat("l2", 0.05)
    radius = {name: BoundCertifier(method=name)(model, x, y, threat).radius for name in ("lmt", "bcp", "crown-ibp")}
    assert (radius["bcp"] >= 0.99 * radius["lmt"]).all()
    assert radius["crown-ibp"].median() > radius["lmt"].median()


@pytest.mark.parametrize("certifier", [BoundCertifier(method="crown-ibp"), BoundCertifier(method="cascade")])
def test_excluded_are_the_classes_with_a_positive_margin(certifier: BoundCertifier) -> None:
    model, (x, y) = small_cnn(seed=3).eval(), images(40)
    threat = Threat("linf", 0.02)
    found = certifier(model, x, y, threat)
    assert found.excluded is not None
    method = "crown" if certifier.method == "cascade" else "crown-ibp"
    margins = bound_margins(model, x, y, threat, method=method, arithmetic="real")
    right = model(x).argmax(1) == y
    for row in range(40):
        others = [j for j in range(4) if j != y[row]]
        excluded = found.excluded[row]
        assert not excluded[y[row]]
        if right[row]:
            assert (excluded[others] >= (margins[row] > 0)).all()
            assert bool(found.verified[row]) == bool(excluded[others].all())
        else:
            assert not excluded.any()
    assert 0 < found.excluded.sum() < 40 * 3


class Logarithms(nn.Module):
    """log of each of two inputs: z_0 − z_1 = log x_0 − log x_1."""

    def forward(self, x: Tensor) -> Tensor:
        return x.log()


@pytest.mark.parametrize("method", ["ibp", "crown", "cascade"])
def test_where_a_network_may_not_be_defined_it_is_not_verified_and_others_are(method: str) -> None:
    x = torch.tensor([[0.9, 0.3], [0.9, 0.1], [0.5, 0.3]], dtype=torch.float64)
    certifier = BoundCertifier(method=method, radius_search="always")
    found = certifier(Logarithms(), x, torch.zeros(3, dtype=torch.int64), Threat("linf", 0.2, -1.0, 1.0))
    assert found.verified.tolist() == [True, False, False]
    assert found.status[1] == "error"  # it may reach log 0
    expected = torch.tensor([0.3, 0.0, 0.1], dtype=torch.float64)
    assert (found.radius <= expected).all()
    torch.testing.assert_close(found.radius, expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("float64", ["always", "undecided"])
def test_float64_that_does_not_fit_is_out_of_memory_and_not_left_out(
    float64: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_float64(model: nn.Module, x: Tensor) -> None:
        raise torch.OutOfMemoryError("float64 does not fit")

    monkeypatch.setattr(bounds, "in_float64", in_float64)
    model = nn.Linear(1, 2).requires_grad_(False)
    model.weight.zero_()
    model.bias.copy_(torch.tensor([1 + 1e-7, 1.0]))  # a margin within the rounding of float32
    with pytest.raises(torch.OutOfMemoryError, match="float64 does not fit"):
        BoundCertifier(float64=float64)(model, torch.rand(1, 1), torch.tensor([0]), Threat("linf", 0.01))
