"""TRADES against the original implementation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast import Threat
from holdfast.objectives import TRADES, Progress
from holdfast.objectives.trades import divergence
from holdfast.search import climb


def original_net(inputs: dict[str, Tensor]) -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(54, 10), nn.Tanh(), nn.Linear(10, 4)
    ).double()
    names = {"0": "conv", "3": "fc1", "5": "fc2"}
    net.load_state_dict({f"{i}.{p}": inputs[f"net.{n}.{p}"] for i, n in names.items() for p in ("weight", "bias")})
    return net


@pytest.mark.parametrize("steps", [10, 20])
def test_inner_ascent_and_loss_equal_the_original(
    reference: Callable[[str], dict[str, Tensor]], steps: int
) -> None:
    inputs, arrays = reference("lolip_net_and_inputs"), reference("lolip_trades")
    net = original_net(inputs)
    x, y, key = inputs["x"], inputs["y"], f"net_inf_K{steps}"
    clean = net(x).detach()
    x_adv = climb(
        lambda points, rows: (divergence(clean[rows], net(points)), None),
        x,
        Threat("linf", 0.1),
        steps=steps,
        step_size=2 * 0.1 / steps,
        start=x + 0.001 * inputs["noise"],
    )
    assert torch.allclose(x_adv, arrays[f"{key}_xadv"], atol=1e-9)
    kl = divergence(net(x), net(x_adv))
    assert kl.sum().item() == pytest.approx(arrays[f"{key}_kl_sum_evalmode"].item(), rel=1e-9)
    # The original sums over the batch where we average: its "sum" loss is ours times the batch size.
    total = (F.cross_entropy(net(x), y, reduction="none").mean() + 6 * kl.mean()) * len(x)
    assert total.item() == pytest.approx(arrays[f"{key}_beta6_sum_loss"].item(), rel=1e-9)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(net.parameters()))])
    assert torch.allclose(gradient, arrays[f"{key}_beta6_sum_paramgrad"], atol=1e-8)


def test_both_reductions_of_the_original(reference: Callable[[str], dict[str, Tensor]]) -> None:
    inputs, arrays = reference("lolip_net_and_inputs"), reference("lolip_trades")
    net = original_net(inputs)
    x, y, x_adv = inputs["x"], inputs["y"], arrays["net_inf_K10_xadv"]
    for reduction, name in (("mean", "sum"), ("unbalanced", "mean")):
        objective = TRADES(beta=6, reduction=reduction)
        loss = objective.loss_at(net, x, y, x_adv, Threat("linf", 0.1), Progress.end())
        assert (len(x) * loss.total).item() == pytest.approx(
            arrays[f"net_inf_K10_beta6_{name}_loss"].item(), rel=1e-9
        )
        gradient = torch.cat(
            [g.flatten() for g in torch.autograd.grad(len(x) * loss.total, list(net.parameters()))]
        )
        assert torch.allclose(gradient, arrays[f"net_inf_K10_beta6_{name}_paramgrad"], atol=1e-8)


def test_divergence_is_zero_only_between_equals() -> None:
    logits = torch.randn(4, 3)
    assert torch.allclose(divergence(logits, logits + 5), torch.zeros(4), atol=1e-6)
    assert (divergence(logits, logits.flip(1)) > 0).all()
    assert torch.isfinite(divergence(1000 * logits, -1000 * logits)).all()
