"""The alarm: what contradicts a certificate, and what does not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdfast import Threat, evaluate
from holdfast.attacks import PGD
from holdfast.certify import BoundCertifier, Certificate, Certifier, SoundnessError
from holdfast.evaluation import sandwich_curve
from holdfast.evaluation.alarm import Claim, Points, Watch

THREAT = Threat("linf", 0.15, 0.0, 2.0)
X, Y = torch.tensor([[0.95]]), torch.tensor([0])


def swallowing(threshold: float) -> nn.Sequential:
    """Class 0 below the threshold; between 1 and it float32, which keeps every second integer beyond 2^24, errs."""
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2))
    large = 2.0**24
    values = [[[1.0]], [0.0], [[1.0]], [large], [[-1.0], [0.0]], [large, -threshold]]
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(torch.tensor(value))
    return model.eval()


class Sure(Certifier):
    """Certifies everything, in the words that it is given."""

    name = "sure"
    arithmetic: Any = None

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, **how: Any) -> Certificate:
        every = torch.ones_like(y, dtype=torch.bool)
        radius = torch.full_like(y, threat.eps, dtype=torch.float64)
        return Certificate(y, every, radius, ["verified"] * len(y), "deterministic", self.arithmetic)


def test_where_float32_errs_and_the_real_network_does_not_it_is_told_and_no_alarm() -> None:
    model, attacks = swallowing(1.5), [PGD(steps=5)]
    assert model(torch.tensor([[1.09]])).argmax() == 1
    assert model.double()(torch.tensor([[1.09]]).double()).argmax() == 0
    model.float()
    found = evaluate(model, X, Y, THREAT, attacks, [BoundCertifier()], attack_certified=True)
    assert found.table["bounds.verified"].all()
    assert found.table["pgd.success"].all()
    assert found.summary["float32_disagrees"] == 1
    assert any(
        "around 1 example float32 errs within a certified radius" in text for text in found.summary["warnings"]
    )
    with pytest.warns(UserWarning, match="the sandwich curve: around 1 example float32 errs"):
        sandwich_curve(model, X, Y, THREAT, found, attacks, [0.15])


@pytest.mark.parametrize(
    ("threshold", "arithmetic"), [(1.0, "real"), (1.0, None), (1.5, "float32"), (1.0, "float32")]
)
def test_what_contradicts_the_words_of_a_certificate_rings(threshold: float, arithmetic: str | None) -> None:
    with pytest.raises(SoundnessError, match=r"certified by sure up to 0\.15 .* pgd breaks it at") as alarm:
        evaluate(
            swallowing(threshold),
            X,
            Y,
            THREAT,
            [PGD(steps=5)],
            [Sure(arithmetic=arithmetic)],
            attack_certified=True,
        )
    assert alarm.value.x_adv > 1


def test_it_is_told_of_the_ball_that_was_looked_into_and_without_certificates_nothing_is() -> None:
    model, near, attacks = swallowing(1.5), THREAT.with_eps(0.01), [PGD(steps=5)]
    assert "float32_disagrees" not in evaluate(model, X, Y, THREAT, attacks).summary
    small = evaluate(model, X, Y, near, attacks, ["bounds"], attack_certified=True, audit=0)
    assert small.summary["float32_disagrees"] == 0
    assert small.table["bounds.radius"][0] > 0.5
    assert (
        evaluate(model, X, Y, near, attacks, ["bounds"]).summary["float32_disagrees"] == 1
    )  # the audit goes there


class Below(nn.Module):
    """Class 0 below the threshold, in the precision it is asked in or in float32."""

    def __init__(self, threshold: float, single: bool = False) -> None:
        super().__init__()
        self.single, self.linear = single, nn.Linear(1, 2)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[0.0], [1.0]]))
            self.linear.bias.copy_(torch.tensor([threshold, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.linear(x.float() if self.single else x)
        return answer


def watched(model: nn.Module, threat: Threat, x: float, x_adv: Tensor) -> float:
    """The margin that the watch sees, at a point that the model was seen to get wrong."""
    center = torch.tensor([[x]])
    points = Points(center, torch.tensor([0]), x_adv, torch.tensor([7]))
    claim = Claim("sure", torch.tensor([threat.eps], dtype=torch.float64))
    return Watch(model, center, threat).check("somebody", [claim], points, wrong=True).item()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("single", [False, True])
def test_the_closed_ball_is_meant_and_distances_are_those_of_the_numbers_as_they_are(
    norm: str, single: bool
) -> None:
    model, free = Below(0.75, single), Threat(norm, 0.25, -math.inf, math.inf)
    edge = torch.tensor([[0.75]])
    with pytest.raises(SoundnessError, match=r"example 7 is .* but somebody breaks it at distance 0\.25") as alarm:
        watched(model, free, 0.5, edge)
    assert torch.equal(alarm.value.x_adv, edge[0])
    beyond = torch.nextafter(edge, torch.ones(1))
    assert 0 < watched(model, free, 0.5, beyond) < 1e-6  # a hair outside it is drawn in
    assert watched(model, free, 0.5, torch.tensor([[0.8]])) == math.inf
    assert watched(Below(0.1, single), free.with_eps(0.1), 0.0, torch.tensor([[0.1]])) > 0  # 0.1 in float32 is more
    with pytest.raises(SoundnessError):
        watched(Below(0.7499, single), free, 0.5, beyond)


class NoRoomForDouble(Below):
    """In float64 it does not fit into the memory."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise torch.OutOfMemoryError("float64 does not fit")
        return super().forward(x)


def test_a_watch_without_room_for_float64_says_so() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="float64 does not fit"):
        watched(NoRoomForDouble(0.75), Threat("linf", 0.25), 0.5, torch.tensor([[0.75]]))
