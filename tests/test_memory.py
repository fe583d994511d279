"""Out of memory is not the end: pieces are halved, the answers stay, and it is said once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from helpers import images, small_cnn
from torch import Tensor, nn

from holdfast import Threat, memory
from holdfast.attacks import APGD, DDN, PGD, Attack
from holdfast.certify import BoundCertifier
from holdfast.memory import in_pieces


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_fitting", {})


def test_pieces_are_halved_until_they_fit_and_stay_so() -> None:
    asked: list[int] = []

    def work(numbers: Tensor) -> Tensor:
        asked.append(len(numbers))
        if len(numbers) > 3:
            raise torch.OutOfMemoryError
        return numbers**2

    with pytest.warns(UserWarning, match="the squares: 16 examples at once do not fit") as said:
        found = joined(in_pieces("the squares", 20, 16, work))
    assert len(said) == 1
    assert asked == [16, 8, 4] + [2] * 10
    assert torch.equal(found, torch.arange(20) ** 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(in_pieces("the squares", 5, 16, work))) == 3


def joined(pieces: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.cat([result for _, result in pieces])


def test_one_example_that_does_not_fit_is_an_error() -> None:
    def work(numbers: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("too large")

    said = pytest.warns(UserWarning, match="everything: 4 examples")
    with said, pytest.raises(torch.OutOfMemoryError, match="too large"):
        list(in_pieces("everything", 4, 4, work))


def test_an_attack_goes_on_with_the_same_answers() -> None:
    network, (x, y) = small_cnn(batch_norm=False).eval(), images(12)
    y = network(x).argmax(1)
    attack, threat = DDN(steps=5), Threat("l2", 1.0)
    expected = attack(network, x, y, threat)
    assert expected.success.any()
    with pytest.warns(UserWarning, match="ddn: 12 examples"):
        nearest = bounded_distances(attack, network, x, y, threat)
    assert torch.allclose(nearest, expected.distance)


def bounded_distances(attack: DDN, network: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """Distances, where gradients of more than five images at once do not fit."""
    real = DDN.minimise

    def minimise(self: DDN, model: nn.Module, targets: object, *rest: object) -> None:
        if len(targets.x) > 5:
            raise torch.OutOfMemoryError
        real(self, model, targets, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DDN, "minimise", minimise)
        return attack(network, x, y, threat).distance


def test_a_certifier_goes_on_with_the_same_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    network, (x, y) = small_cnn(batch_norm=False).eval(), images(12)
    certifier, threat = BoundCertifier(method="ibp"), Threat("linf", 0.01)
    expected = certifier(network, x, y, threat)
    real = BoundCertifier.prover

    def prover(self: BoundCertifier, *args: object) -> object:
        prove = real(self, *args)

        def limited(examples: object) -> object:
            if len(examples.x) > 5:
                raise torch.OutOfMemoryError
            return prove(examples)

        return limited

    monkeypatch.setattr(BoundCertifier, "prover", prover)
    with pytest.warns(UserWarning, match="bounds: 12 examples"):
        found = certifier(network, x, y, threat)
    assert torch.equal(found.verified, expected.verified)
    assert torch.allclose(found.radius, expected.radius)


class Roomy(nn.Module):
    """A network that takes so many inputs at once and no more, with gradients a fourth of them."""

    def __init__(self, network: nn.Module, most: int) -> None:
        super().__init__()
        self.network, self.most = network, most

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > (self.most // 4 if torch.is_grad_enabled() else self.most):
            raise torch.OutOfMemoryError(f"{len(x)} do not fit")
        logits: Tensor = self.network(x)
        return logits


def test_a_model_that_has_no_room_is_certified_and_attacked_in_halves() -> None:
    network, (x, y), threat = small_cnn(batch_norm=False).eval(), images(12), Threat("l2", 0.05)
    y = network(x).argmax(1)
    roomy = Roomy(network, 24)
    with pytest.warns(UserWarning, match="bounds: 12 examples"):
        certified = BoundCertifier()(roomy, x, y, threat)  # which holds a trace against the network on 3 n + 6
    assert certified.status == BoundCertifier()(network, x, y, threat).status
    with pytest.warns(UserWarning, match="ddn: 12 examples"):
        found = DDN(steps=5)(roomy, x, y, threat)
    assert torch.allclose(found.distance, DDN(steps=5)(network, x, y, threat).distance)


@pytest.mark.parametrize("attack", [PGD(steps=2), APGD(steps=2), DDN(steps=2)])
@pytest.mark.parametrize("most", [0, 1])
def test_a_model_that_has_no_room_for_what_is_asked_is_out_of_memory_and_no_advice(
    attack: Attack, most: int
) -> None:
    x, y = images(3)
    with pytest.raises(torch.OutOfMemoryError, match=f"{most + 1} do not fit"):
        attack(Roomy(small_cnn().eval(), most), x, y, Threat("l2", 0.05), batch_size=most + 1)
