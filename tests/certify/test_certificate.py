"""The contract of every certifier that proves what it says of the network itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import IN_PLACE, Trace, images, linear_model, linear_radius, small_cnn, twins
from torch import Tensor, nn

from holdfast import Threat
from holdfast.attacks import PGD
from holdfast.certify import BranchAndBoundCertifier, Certificate, Certifier, Findings

SAMPLING = {"smoothing", "plug-in"}  # these speak of another classifier: see test_smoothing.py
NAMES = sorted(set(Certifier.registry) - SAMPLING)
NORM = {"bounds": "linf", "branch-and-bound": "linf", "lipschitz": "l2"}
"""Where each is exact for a linear model."""
every_certifier = pytest.mark.parametrize("certifier", [Certifier.registry[n]() for n in NAMES], ids=NAMES)


@every_certifier
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_no_attack_breaks_what_is_certified(certifier: Certifier, norm: str) -> None:
    model, (x, y) = small_cnn(), images(60)
    threat = Threat(norm, 0.005)
    certificate = certifier(model, x, y, threat)
    assert certificate.verified.any()
    assert not (certificate.verified & PGD(steps=20)(model, x, y, threat).success).any()
    for row in certificate.verified.nonzero().squeeze(1)[:10].tolist():
        radius = certificate.radius[row].item()
        assert not PGD(steps=20)(model, x[[row]], y[[row]], Threat(norm, radius)).success.any()


@every_certifier
def test_the_parts_of_a_certificate_agree(certifier: Certifier) -> None:
    model, (x, y), threat = small_cnn(), images(60), Threat("l2", 0.03)
    certificate = certifier(model, x, y, threat)
    right = certificate.prediction == y
    assert torch.equal(certificate.prediction, model.eval()(x).argmax(1))
    assert torch.equal(certificate.verified, torch.tensor([s == "verified" for s in certificate.status]))
    assert torch.equal(~right, torch.tensor([s == "wrong" for s in certificate.status]))
    assert (certificate.radius[certificate.verified] >= threat.eps).all()
    assert (certificate.radius[right & ~certificate.verified] < threat.eps).all()
    assert (certificate.radius[~right] == 0).all()
    assert {"verified", "undecided", "wrong"} == set(certificate.status) - {"refuted"}


@every_certifier
def test_leaves_no_trace_and_the_split_changes_nothing(certifier: Certifier) -> None:
    model, (x, y), threat = small_cnn().train(), images(30), Threat("linf", 0.01)
    model[1].eval()
    trace = Trace(model)
    whole = certifier(model, x, y, threat)
    trace.check()
    told: list[tuple[int, int]] = []
    split = certifier(model, x, y, threat, batch_size=7, on_progress=lambda *news: told.append(news))
    if isinstance(certifier, BranchAndBoundCertifier):  # image by image, those that cheap bounds leave open
        assert told == [(left, 0) for left in range(told[0][0], -1, -1)]
    else:
        assert told == [(left, 0) for left in (23, 16, 9, 2, 0)]
    assert torch.equal(split.verified, whole.verified)
    assert torch.allclose(split.radius, whole.radius, rtol=1e-3)
    assert split.status == whole.status
    assert certifier(model, x[:1], y[:1], threat).status == whole.status[:1]
    assert certifier(model, x[:0], y[:0], threat).status == []


@every_certifier
def test_is_exact_for_a_linear_model(certifier: Certifier) -> None:
    model = linear_model().double()
    x = torch.rand(20, 1, 2, 3, dtype=torch.float64)
    y = model(x).argmax(1)
    exact = linear_radius(model, x, y, NORM[certifier.name])
    eps = 1.001 * exact.median().item()
    certificate = certifier(model, x, y, Threat(NORM[certifier.name], eps, -math.inf, math.inf))
    assert torch.equal(certificate.verified, exact > eps)
    assert (certificate.radius <= exact * (1 + 1e-12)).all()
    assert (exact - certificate.radius <= 0.011 * eps).all() or not certifier.finds_radii


@every_certifier
def test_what_nothing_in_the_box_changes_has_infinite_radius(certifier: Certifier) -> None:
    model = linear_model()
    with torch.no_grad():
        model[1].weight.mul_(1e-3)
        model[1].bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    x, y = torch.rand(4, 1, 2, 3), torch.zeros(4, dtype=torch.int64)
    for norm in ("linf", "l2", "l1"):
        certificate = certifier(model, x, y, Threat(norm, 0.1))
        assert certificate.verified.all()
        assert certificate.radius.isinf().all() or not certifier.finds_radii
    assert certifier(model, x, y, Threat("linf", 0.0)).verified.all()


@every_certifier
def test_a_radius_is_found_also_below_an_eps_larger_than_the_box(certifier: Certifier) -> None:
    model = linear_model().double()
    x = torch.rand(20, 1, 2, 3, dtype=torch.float64)
    y = model(x).argmax(1)
    small = certifier(model, x, y, Threat("linf", 0.5)).radius
    large = certifier(model, x, y, Threat("linf", 5.0)).radius
    finite = small.isfinite()
    assert torch.allclose(large[finite], small[finite], atol=0.02)
    assert torch.equal(large.isfinite(), finite)


@every_certifier
def test_an_infinite_margin_is_no_proof(certifier: Certifier) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([3e38, -3e38]))
    x, y = torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64)
    certificate = certifier(model, x, y, Threat("linf", 0.0))
    assert certificate.status == ["error"]
    assert not certificate.verified.any()
    assert certificate.radius.item() == 0


@every_certifier
def test_nonsense_is_never_verified(certifier: Certifier) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight.fill_(3e38)
        model[1].bias.copy_(torch.tensor([1.0, 0.0]))
        model[1].weight[1] = -3e38
    x, y = torch.zeros(1, 1, 2, 2), torch.zeros(1, dtype=torch.int64)
    overflow = certifier(model, x, y, Threat("linf", 1.0))
    assert overflow.status == ["undecided"]  # too large for float32, not for float64
    assert not overflow.verified.any()
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    broken = certifier(model, x, y, Threat("linf", 0.1))
    assert broken.status == ["error"]
    assert not broken.verified.any()
    assert broken.radius.item() == 0
    with pytest.raises(ValueError, match="box"):
        certifier(small_cnn(), images(3)[0] + 1, images(3)[1], Threat("linf", 0.1))


@pytest.mark.parametrize("certifier", ["bounds", "lipschitz", "smoothing", "plug-in"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_a_model_that_works_in_place_is_certified_like_one_that_does_not(certifier: str, name: str) -> None:
    (hasty, plain), (x, _) = twins(name), images(6)
    y = plain.eval()(x).argmax(1)
    before, threat = x.clone(), Threat("l2", 0.03)
    prove = Certifier.parse({"name": certifier} | ({"n": 500} if certifier in SAMPLING else {}))
    certificate, expected = prove(hasty, x, y, threat), prove(plain, x, y, threat)
    assert torch.equal(x, before)
    assert torch.equal(certificate.prediction, expected.prediction)
    assert torch.equal(certificate.verified, expected.verified)
    assert torch.equal(certificate.radius, expected.radius)


METHODS = ("ibp", "crown-ibp", "crown", "cap", "one-step", "alpha-crown", "bcp", "lmt", "cascade")
EVERY = [
    *({"name": "bounds", "method": method} for method in METHODS),
    *(
        {"name": name} | ({"n": 500} if name in SAMPLING else {})
        for name in sorted(Certifier.registry)
        if name != "bounds"
    ),
]
any_certifier = pytest.mark.parametrize("settings", EVERY, ids=lambda one: one.get("method", one["name"]))
TINY_L2 = Threat("l2", 0.001)


def breakable() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 6), nn.ReLU(), nn.Linear(6, 3)]
    return nn.Sequential(*layers).eval().requires_grad_(False)


@any_certifier
@pytest.mark.parametrize("layer", [0, 3, 5])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_without_a_value_are_an_error(settings: dict, layer: int, value: float) -> None:
    model, x, y = breakable(), torch.rand(3, 1, 4, 4) + 0.01, torch.tensor([0, 1, 2])
    model[layer].weight.view(-1)[0] = value
    threat = Threat("l2", 0.001, -1.0, 2.0)
    known = model(x).isfinite().all()
    certificate = Certifier.parse(settings)(model, x, y, threat)
    assert not certificate.verified.any() or known
    if not known:
        assert certificate.status == ["error"] * 3
        assert (certificate.radius == 0).all()


@any_certifier
def test_a_bias_that_overflows_is_an_error(settings: dict) -> None:
    model, x, y = breakable(), torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 2])
    model[3].bias.fill_(1e38)
    model[5].weight.fill_(1e3)
    certificate = Certifier.parse(settings)(model, x, y, TINY_L2)
    assert certificate.status == ["error"] * 3
    assert (certificate.radius == 0).all()


@any_certifier
def test_an_image_whose_logits_overflow_is_the_only_error(settings: dict) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False)).requires_grad_(False)
    model[1].weight.copy_(torch.tensor([[2e18, 2e18], [1e18, 1e18]]))
    x, y = torch.tensor([0.5, 1e21, 0.4])[:, None, None, None].repeat(1, 1, 1, 2), torch.zeros(3, dtype=torch.int64)
    noise = {"sigma": 0.01, "grid_bits": None} if settings["name"] in SAMPLING else {}
    certificate = Certifier.parse(settings | noise)(model, x, y, Threat("l2", 0.001, 0.0, 2e21))
    assert certificate.status[1] == "error"
    assert "error" not in (certificate.status[0], certificate.status[2])
    assert certificate.radius[1] == 0


@every_certifier
def test_what_a_radius_says_holds_beyond_the_box(certifier: Certifier) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).requires_grad_(False)
    model[1].weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]))
    model[1].bias.copy_(torch.tensor([10.0, 0]))
    x, y = torch.full((1, 1, 2, 2), 0.5), torch.zeros(1, dtype=torch.int64)
    for norm in ("linf", "l2", "l1"):
        certificate = certifier(model, x, y, Threat(norm, 9.0))
        assert (certificate.radius.isinf() == certificate.verified).all()
        assert certificate.status == ["verified"]


class InPiecesOfItsOwn(Certifier):
    """Finds of each example, right or not, that its prediction holds, in the pieces that it is given."""

    name = "in pieces of its own"
    pieces: Any = None

    def findings(self, model: nn.Module, x: Tensor, y: Tensor, *more: Any) -> Any:
        assert y.tolist() == [0, 1, 2, 0]
        return iter(self.pieces) if isinstance(self.pieces, list) else self.pieces


def certified_in(pieces: object) -> Certificate:
    model, y = linear_model(), torch.tensor([0, 1, 2, 0])
    return InPiecesOfItsOwn(pieces=pieces)(model, torch.rand(4, 1, 2, 3), y, Threat("linf", 0.1))


def piece(*places: int, **more: Any) -> tuple[Tensor, Findings]:
    """Of these examples, class 0 each."""
    columns = {"prediction": torch.zeros(len(places), dtype=torch.int64)} | more
    radius = torch.full((len(places),), 0.2, dtype=torch.float64)
    return torch.tensor(places, dtype=torch.int64), Findings(radius, **columns)


def test_findings_of_ones_own_come_at_once_or_in_pieces() -> None:
    expected = ["verified", "wrong", "wrong", "verified"]
    assert certified_in(piece(0, 1, 2, 3)[1]).status == expected
    assert certified_in([piece(3, 1), piece(), piece(0, 2)]).status == expected


@pytest.mark.parametrize(
    ("pieces", "fault"),
    [
        ([piece(0, 1), piece(3)], "1 of 4 examples are left out"),
        ([], "4 of 4 examples are left out"),
        ([piece(0, 1), piece(1, 2, 3)], "an example is found twice, or is none of the 4"),
        ([piece(0, 1, 1, 2, 3)], "an example is found twice"),
        ([piece(0, 1, 2, 3), piece(4)], "is none of the 4"),
        ([piece(0, 1, 2, -1)], "is none of the 4"),
        ([piece(0, 1), piece(2, 3, margin=torch.ones(2))], "some pieces alone have margin"),
        ([piece(0, 1, method=["a", "b"]), piece(2, 3)], "some pieces alone have method"),
        ([piece(0, 1, 2, 3, prediction=None)], "a piece has no prediction"),
        (piece(0, 1, 2)[1], r"a piece of 4 examples has columns of other lengths: {'radius': 3, 'prediction': 3}"),
        ([piece(0, 1, 2, 3, method=["a"])], "{'method': 1}"),
    ],
)
def test_findings_of_ones_own_that_break_the_contract_say_whose_they_are(pieces: object, fault: str) -> None:
    with pytest.raises(ValueError, match=f"the findings of InPiecesOfItsOwn: .*{fault}"):
        certified_in(pieces)
