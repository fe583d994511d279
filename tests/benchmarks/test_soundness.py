"""A few hundred cases of the soundness benchmark, and proof that it would see a certificate that is false."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import nn

from holdfast import Threat
from holdfast.certify import Certificate


def test_no_certificate_is_false(soundness: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    cases = soundness.EXAMPLES * len(soundness.METHODS)
    code = soundness.main(["--cases", str(cases), "--seed", "1"])
    printed = capsys.readouterr().out
    assert code == 0, printed
    for method in soundness.METHODS:
        assert f"| {method} | {soundness.EXAMPLES} |" in printed


@pytest.mark.parametrize("number", range(4))
def test_a_batch_is_made_again_from_its_number(soundness: ModuleType, number: int) -> None:
    first, second = soundness.Batch.drawn(3, number), soundness.Batch.drawn(3, number)
    assert (first.kind, first.threat, first.region) == (second.kind, second.threat, second.region)
    assert torch.equal(first.x, second.x)
    assert all(map(torch.equal, first.model.state_dict().values(), second.model.state_dict().values()))


def liar(radius: float) -> Certificate:
    """Whatever it is asked about one input, it is verified."""
    yes = torch.ones(1, dtype=torch.bool)
    return Certificate(
        yes.long() - 1, yes, torch.tensor([radius], dtype=torch.float64), ["verified"], "deterministic"
    )


def test_a_false_certificate_is_counted_and_printed(
    soundness: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    large = 2.0**24
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)).eval()
    for number, (weight, bias) in {
        0: ([[1.0]], [0.0]),
        2: ([[1.0]], [large]),
        4: ([[-1.0], [0.0]], [large, -1.0]),
    }.items():
        model[number].load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
    x, y, threat = torch.tensor([[0.95]]), torch.tensor([0]), Threat("linf", 0.01, 0.0, 2.0)

    def batch(radius: float) -> object:
        made = soundness.Batch(7, soundness.Draw(0, 7), "dense", "ibp", "linf", threat, model, x, y)
        monkeypatch.setattr(made, "certify", lambda eps, search: liar(radius))
        monkeypatch.setattr(made, "_edge", lambda radius, verdicts: verdicts)
        return made

    count = soundness.Count()
    count.judge(batch(0.03))  # true: at 0.98 the margin is 0.02
    assert (count.claimed.total(), count.false.total()) == (1, 0)
    count.judge(batch(0.15))
    assert (count.claimed.total(), count.false.total()) == (2, 1)
    assert "FALSE --only 7, example 0: ibp, dense" in capsys.readouterr().out
