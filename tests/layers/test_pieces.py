"""Networks of one batch size, asked in pieces: the answers and the bounds of the network itself."""

from __future__ import annotations

import pytest
import torch
from helpers import images
from torch import Tensor, nn

from holdfast import Threat
from holdfast.attacks import PGD
from holdfast.bounds import bound_margins
from holdfast.certify import BoundCertifier
from holdfast.layers import InPieces, Normalize


class OfOneSize(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.inner, self.head = size, nn.Linear(64, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.inner(x.view(self.size, 64))).reshape(self.size, 2, 4).view(self.size, 8))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_any_batch_is_answered_as_its_examples(size: int) -> None:
    network, (x, _) = OfOneSize(size).eval(), images(7)
    wanted = network.head(torch.relu(network.inner(x.flatten(1))))
    for n in (7, 6, 3, 1, 0):
        assert torch.allclose(InPieces(network, size)(x[:n]), wanted[:n], atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("method", ["ibp", "crown"])
def test_its_bounds_are_those_of_the_network(size: int, method: str) -> None:
    network, (x, y), threat = OfOneSize(size).eval(), images(4), Threat("linf", 0.05)
    plain = nn.Sequential(nn.Flatten(), network.inner, nn.ReLU(), network.head)
    for model, wanted in (
        (InPieces(network, size), plain),
        (
            nn.Sequential(Normalize([0.4], [0.3]), InPieces(network, size)),
            nn.Sequential(Normalize([0.4], [0.3]), plain),
        ),
    ):
        found = bound_margins(model.eval(), x, y, threat, method)
        assert torch.allclose(found, bound_margins(wanted.eval(), x, y, threat, method), atol=1e-6)
        assert BoundCertifier()(model, x, y, threat).status == BoundCertifier()(wanted, x, y, threat).status
    assert PGD(steps=3)(InPieces(network, size), x, y, threat, seed=0).x_adv.shape == x.shape


def test_a_batch_of_none_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        InPieces(OfOneSize(1), 0)
