"""Signs that an attack, not the model, is weak: each is raised by a model made to show it, and by no other."""

from __future__ import annotations

import pytest
import torch
from helpers import images, linear_model, small_cnn
from torch import Tensor, nn

from holdfast import Threat, evaluate
from holdfast.attacks import PGD
from holdfast.evaluation.sanity import suspicions

THREAT = Threat("linf", 0.1)


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = small_cnn()


class Moody(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.network(x + 0.1 * torch.rand(x.shape))


class Probabilities(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).softmax(1)


class Quantised(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.network((x * 8).round() / 8)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(context: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return -gradient


class Misleading(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.network(Reversed.apply(x))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Moody, "answers at random"),
        (Probabilities, "are probabilities, not logits"),
        (Quantised, "exactly zero for 60 of 60"),
        (Misleading, "more steps do not raise the loss"),
    ],
)
def test_each_sign_is_seen(model: type[nn.Module], words: str) -> None:
    x, _ = images(60)
    y = small_cnn().eval()(x).argmax(1)
    found = suspicions(model(), x, y, THREAT)
    assert [text for text in found if words in text]
    if model is not Moody:
        assert len(found) == 1, found


def test_honest_models_raise_no_doubts() -> None:
    x, _ = images(60)
    for model in (small_cnn(), linear_model(classes=4, shape=(1, 8, 8))):
        assert suspicions(model, x, model.eval()(x).argmax(1), THREAT) == []


def test_what_only_a_blind_attack_breaks_is_told() -> None:
    x, _ = images(60)
    model = Quantised()
    y = model.eval()(x).argmax(1)
    attacks = [PGD(steps=5, random_start=False), {"name": "square", "queries": 200}]
    summary = evaluate(model, x, y, Threat("linf", 0.3), attacks).summary
    assert summary["attacked"]["square"] < summary["attacked"]["pgd"]
    assert any("sees answers only" in text for text in summary["warnings"])
    plain = evaluate(small_cnn(), x, y, THREAT, ["pgd", {"name": "square", "queries": 50}]).summary
    assert plain["warnings"] == []
