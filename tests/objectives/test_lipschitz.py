"""Losses of 1-Lipschitz networks against the original arrays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast import Threat
from holdfast.objectives import CertificateRegularisation, LogitAnnealing, MarginHinge, OffsetCrossEntropy, Progress
from holdfast.objectives.lipschitz import logit_margins, offset_cross_entropy

Reference = Callable[[str], dict[str, Tensor]]


def test_offset_cross_entropy(reference: Reference) -> None:
    arrays = reference("intriguing_metrics")
    logits, y = arrays["logits"].double(), arrays["labels"]
    for number, (offset, temperature) in enumerate(arrays["ox_configs"].tolist()):
        free = logits.clone().requires_grad_(True)
        each = offset_cross_entropy(free, y, offset, temperature)
        each.mean().backward()
        # The original multiplies the offset in float32.
        assert torch.allclose(each.detach(), arrays[f"ox{number}_persample"].double(), rtol=0, atol=1e-6)
        assert torch.allclose(each.mean().detach(), arrays[f"ox{number}_value"].double(), rtol=0, atol=1e-6)
        assert torch.allclose(free.grad, arrays[f"ox{number}_grad"].double(), rtol=0, atol=1e-6)
        soft = offset_cross_entropy(logits, F.one_hot(y, 10).double(), offset, temperature)
        assert torch.allclose(soft, each.detach())


def test_the_comparison_s_loss_and_margins(reference: Reference) -> None:
    arrays = reference("intriguing_llc_metrics")
    logits, y = arrays["logits"].double(), arrays["labels"]
    found = offset_cross_entropy(logits, y, 0.3993, 0.25).mean()
    assert torch.allclose(found, arrays["lipce_m0.3993_t0.25"].double(), rtol=0, atol=1e-6)
    assert torch.allclose(logit_margins(logits, y), arrays["signed_margin"].double(), rtol=0, atol=1e-6)


def test_hinge_and_certificate_regularisation_by_hand() -> None:
    x, y = torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.5, 0.25]]), torch.tensor([0, 2])
    model, threat, end = nn.Identity(), Threat("l2", 0.1, -9, 9), Progress.end()
    assert MarginHinge(margin=1.0).loss(model, x, y, threat, end).total == pytest.approx((0 + 1.25) / 2)
    expected = F.cross_entropy(x, y).item() - 0.3 * (2 / 2**0.5) / 2
    loss = CertificateRegularisation(gamma=0.3).loss(model, x, y, threat, end)
    assert loss.total.item() == pytest.approx(expected, rel=1e-6)


def test_annealed_logits_by_hand() -> None:
    x, y = torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.5, 0.25], [90.0, 0.0, 0.0]]), torch.tensor([0, 2, 0])
    model, threat, end = nn.Identity(), Threat("l2", 0.1, -9, 9), Progress.end()
    settings = {"offset": 0.5, "temperature": 0.75}
    p = ((x - 0.5 * F.one_hot(y, 3)) / 0.75).softmax(1).gather(1, y[:, None])
    expected = (-0.75 * (1 - p) ** 5 * p.log()).mean().item()
    assert LogitAnnealing(**settings).loss(model, x, y, threat, end).total.item() == pytest.approx(
        expected, rel=1e-5
    )
    plain = offset_cross_entropy(x, y, 0.5, 0.75).mean().item()
    assert LogitAnnealing(gamma=0, **settings).loss(model, x, y, threat, end).total.item() == pytest.approx(plain)
    free = x.clone().requires_grad_(True)  # the last row is right beyond any doubt
    LogitAnnealing(gamma=0.5, **settings).loss(model, free, y, threat, end).total.backward()
    assert free.grad.isfinite().all()


def test_an_offset_may_be_a_fraction() -> None:
    assert OffsetCrossEntropy.model_validate({"offset": "36/255"}).offset == 36 / 255
    with pytest.raises(ValueError, match="fraction"):
        OffsetCrossEntropy.model_validate({"offset": "a lot"})
