"""The bound certifier on the reference networks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from holdfast import Threat
from holdfast.certify import BoundCertifier
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
