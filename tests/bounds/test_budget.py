"""One budget: pieces of examples, of functions and of neurons change nothing but what is held at a time."""

from __future__ import annotations

import pytest
import torch
from helpers import Largest
from torch import nn

from holdfast import Threat
from holdfast.bounds import METHODS, Bounder, BoundMethod, bound_margins, bound_outputs, budget, differences, trace
from holdfast.certify import BoundCertifier

EXAMPLES, CLASSES = 5, 7


def network() -> nn.Sequential:
    torch.manual_seed(0)
    convolutions = nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 4, 2, 1), nn.ReLU()
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, CLASSES)).eval()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("method", METHODS)
def test_pieces_change_nothing(method: str, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network().double(), torch.rand(EXAMPLES, 1, 8, 8).double()
    y, threat = torch.arange(EXAMPLES), Threat(norm, {"linf": 0.02, "l2": 0.1}[norm])

    def found() -> list[torch.Tensor]:
        with torch.no_grad():
            margins = bound_margins(model, x, y, threat, method, iterations=2)
            outputs = bound_outputs(model, x, threat, method) if method in ("ibp", "crown-ibp", "crown") else ()
        return [margins, *outputs]

    whole = found()
    monkeypatch.setattr(budget, "SWEEP", 1500)  # two examples
    monkeypatch.setattr(budget, "PASS", 500)  # two functions
    for one, other in zip(found(), whole, strict=True):
        assert torch.allclose(one, other, atol=1e-9)


def test_a_pass_from_many_classes_holds_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    classes, width = 200, 500
    model = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, classes)).eval()
    monkeypatch.setattr(budget, "PASS", 20 * width)
    monkeypatch.setattr(differences, "PIECE", 20 * width)
    x, y = torch.rand(9, 4), torch.arange(9)
    with torch.no_grad(), Largest() as largest:
        bound_margins(model, x, y, Threat("linf", 0.1), "crown-ibp")
    assert largest.entries <= max(20 * width, classes * width)


def test_a_certifier_tells_of_every_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, told = network(), torch.rand(EXAMPLES, 1, 8, 8), []
    y = model(x).argmax(1)
    monkeypatch.setattr(budget, "SWEEP", 1500)
    assert Bounder(trace(model, x), BoundMethod()).room(x) == 2
    BoundCertifier(method="crown-ibp")(
        model, x, y, Threat("linf", 0.01), on_progress=lambda left, _: told.append(left)
    )
    assert told == [3, 1, 0]
