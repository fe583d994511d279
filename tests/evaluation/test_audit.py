"""The audit: it looks where a false certificate would show, and finds it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import images, linear_model, linear_radius, small_cnn
from torch import Tensor, nn

from holdfast import Threat, evaluate
from holdfast.attacks import PGD
from holdfast.certify import BoundCertifier, Certificate, Certifier, LipschitzCertifier, SoundnessError
from holdfast.evaluation.alarm import Claim, Points, Watch
from holdfast.evaluation.audit import CHEAP, Effort, affordable, audit, closest_first, radii_of

NORMS = ("linf", "l2", "l1")


class Stretched(Certifier):
    """Exact radii of a linear classifier, but for one example, whose radius is too large by a thousandth."""

    lie: int | None = None
    tells_margins: bool = True

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, **how: Any) -> Certificate:
        radius = 0.9999 * linear_radius(model, x, y, threat.norm).double()  # type: ignore[arg-type]
        right = radius > 0
        if self.lie is not None:
            radius[self.lie] *= 1.001
        margin = radius - threat.eps if self.tells_margins else None
        word = ["verified" if holds else "undecided" for holds in radius >= threat.eps]
        verified = right & (radius >= threat.eps)
        return Certificate(y, verified, radius.clamp(min=0), word, "deterministic", "real", margin=margin)


def linear(norm: str) -> tuple[nn.Sequential, Tensor, Tensor, Tensor, Threat]:
    """A classifier, 60 images that it gets right, their radii, and a threat that the most of them stand."""
    model, (x, _) = linear_model(classes=3, shape=(1, 8, 8)), images(60)
    y = model(x).argmax(1)
    radius = linear_radius(model, x, y, norm)
    return model, x, y, radius, Threat(norm, radius.quantile(0.2).item(), -math.inf, math.inf)


@pytest.mark.parametrize("tells_margins", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_a_lie_at_the_smallest_margin_is_caught_by_default(norm: str, tells_margins: bool) -> None:
    model, x, y, radius, threat = linear(norm)
    order = radius.masked_fill(radius < threat.eps, math.inf).argsort()
    honest = evaluate(model, x, y, threat, [], [Stretched(tells_margins=tells_margins)])
    assert honest.summary["audit"]["examples"] == 8
    assert honest.summary["audit"]["smallest_margin"] > 0
    lie = int(order[2])
    with pytest.raises(SoundnessError, match=f"example {lie} is certified by .*, but the audit breaks it") as alarm:
        evaluate(model, x, y, threat, [], [Stretched(lie=lie, tells_margins=tells_margins)])
    assert model(alarm.value.x_adv[None].float()).argmax() != y[lie]
    evaluate(model, x, y, threat, [], [Stretched(lie=int(order[40]))])  # not where it would show
    evaluate(model, x, y, threat, [], [Stretched(lie=lie)], audit=0)


@pytest.mark.parametrize("norm", [*NORMS, "l0"])
def test_the_worst_corner_of_a_linear_classifier_in_its_box_is_found(norm: str) -> None:
    model, (x, _) = linear_model(classes=2, shape=(1, 8, 8)), images(12)
    y, eps = model(x).argmax(1), {"linf": 0.02, "l2": 0.2, "l1": 1.0, "l0": 3.0}[norm]
    threat = Threat(norm, eps)
    weight = model[1].weight
    logits, down = model(x), (weight[1 - y] - weight[y]).view_as(x)
    exact = (logits.gather(1, y[:, None]) - logits.gather(1, 1 - y[:, None])).squeeze(1) - threat.support(x, down)
    one = [Claim("any", torch.full((12,), eps, dtype=torch.float64))]
    stands = (exact > 1e-3).nonzero().squeeze(1)
    assert len(stands) > 1
    found = audit(Watch(model, x, threat), one, x, y, stands, Effort(corners=1, steps=1))
    assert found.smallest_margin == pytest.approx(exact[stands].min().item(), abs=1e-4)
    assert found.example == stands[exact[stands].argmin()]
    assert found.passes == len(stands) * Effort(corners=1, steps=1).passes(2)


def test_it_is_asked_at_eps_and_at_the_certified_radius_and_the_closest_first() -> None:
    threat, x = Threat("linf", 0.1), torch.zeros(4, 3)
    claims = [
        Claim("a", torch.tensor([0.1, 0.3, math.inf, 0.0], dtype=torch.float64)),
        Claim("b", torch.tensor([-1.0, 0.2, 0.1, -1.0], dtype=torch.float64)),
    ]
    radii = radii_of(claims, threat, x)
    assert torch.equal(radii.isfinite(), torch.tensor([[True, False], [True, True], [True, True], [False, False]]))
    assert radii[1:3, 1].tolist() == pytest.approx([0.3, 1.0])  # the whole box
    assert not radii_of(claims, Threat("linf", 0.1, -math.inf, math.inf), x)[2, 1].isfinite()
    assert closest_first(claims, {}, 0.1).tolist() == [0, 2, 1]
    assert closest_first(claims, {"a": torch.tensor([3.0, 1.0, 2.0, 0.0])}, 0.1).tolist() == [1, 2, 0]
    rows = torch.tensor([0, 1, 2])
    assert affordable(rows, radii, passes=30, each=10, least=1).tolist() == [0, 1]
    assert affordable(rows, radii, passes=29, each=10, least=1).tolist() == [0]
    assert affordable(rows, radii, passes=0, each=10, least=8).tolist() == [0, 1, 2]


def test_the_default_costs_two_in_a_hundred_of_the_passes_and_changes_no_answer() -> None:
    model, (x, _) = small_cnn(), images(300)
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    threat, certifiers = Threat("linf", 0.01), [BoundCertifier()]
    found = evaluate(model, x, y, threat, [PGD(steps=100, restarts=2)], certifiers)
    summary = found.summary
    spent = sum(summary["passes"]["pgd"][key] for key in ("forwards", "backwards")) + 2 * len(x)
    assert summary["audit"]["examples"] > 8
    assert 0.8 * 0.02 * spent < summary["audit"]["passes"] <= 0.02 * spent
    assert summary["audit"]["smallest_margin"] > 0
    without = evaluate(model, x, y, threat, [PGD(steps=100, restarts=2)], certifiers, audit=0)
    assert without.table.equals(found.table)
    assert "audit" not in without.summary


def test_an_audit_passes_what_is_true_and_counts_its_passes() -> None:
    calls = 0

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = linear_model(classes=4, shape=(1, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            answer: Tensor = self.inner(x)
            return answer

    model, (x, _) = Counted().eval(), images(10)
    y, threat = model(x).argmax(1), Threat("l2", 1e-3)
    certificate = LipschitzCertifier()(model.inner, x, y, threat)
    claims = [Claim("lipschitz", certificate.radius.masked_fill(~certificate.verified, -1.0))]
    watch = Watch(model, x, threat)
    watch.margins(Points(x, y, x, torch.arange(10)))
    calls = 0
    effort = Effort(corners=2, steps=3, restarts=2, targets=None)
    found = audit(watch, claims, x, y, torch.arange(10), effort)
    assert found.smallest_margin is not None
    assert found.smallest_margin > 0
    asked = int(radii_of(claims, threat, x).isfinite().sum())
    backwards = 3 * 2 * 5
    assert found.passes == asked * (calls + backwards)


def test_cheap_is_cheap() -> None:
    assert CHEAP.passes(10) == CHEAP.passes(1000) == 30
