"""TULIP against the original arrays; gradient penalties, CURE and LLR where they are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast import Threat
from holdfast.objectives import CURE, LLR, TULIP, InputGradient, Progress

Reference = Callable[[str], dict[str, Tensor]]
THREAT = Threat("linf", 0.1)
END = Progress.end()


@pytest.fixture
def net(reference: Reference) -> tuple[nn.Module, Tensor, Tensor]:
    arrays = reference("lolip_net_and_inputs")
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(54, 10), nn.Tanh(), nn.Linear(10, 4)
    ).double()
    values = [value for key, value in arrays.items() if key.startswith("net.")]
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(value)
    return model, arrays["x"], arrays["y"]


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("h", ["1", "0.1", "0.01", "0.001"])
def test_tulip(h: str, net: tuple[nn.Module, Tensor, Tensor], reference: Reference) -> None:
    """Sums over the batch there, means here; the clean gradient counts twice there, once here."""
    model, x, y = net
    arrays, count = reference("lolip_tulip"), len(x)
    loss = TULIP(weight=0.1, h=float(h)).loss(model, x, y, THREAT, END)
    assert loss.parts["penalty"].item() * count == pytest.approx(arrays[f"h{h}_penalty"].item(), rel=1e-9)
    assert loss.total.item() * count == pytest.approx(arrays[f"h{h}_lam0.1_loss"].item(), rel=1e-9)
    loss.total.backward()
    once = arrays[f"h{h}_lam0.1_paramgrad_as_applied"] - arrays["paramgrad_clean_sum_ce"]
    assert torch.allclose(gradients(model) * count, once, rtol=0, atol=1e-8)


def test_the_limit_of_tulip_is_the_exact_penalty(
    net: tuple[nn.Module, Tensor, Tensor], reference: Reference
) -> None:
    model, x, y = net
    exact = reference("lolip_tulip")["exact_gradient_penalty_half_sum_sq_own"].item()
    loss = InputGradient().loss(model, x, y, THREAT, END)
    assert loss.parts["penalty"].item() * len(x) == pytest.approx(exact, rel=1e-9)
    near = TULIP(h=1e-5).loss(model, x, y, THREAT, END).parts["penalty"]
    assert near.item() == pytest.approx(loss.parts["penalty"].item(), rel=1e-4)
    loss.total.backward()
    analytic = gradients(model)
    model.zero_grad()
    weight, shift = model[0].weight, 1e-6
    with torch.no_grad():
        weight[0, 0, 1, 1] += shift
    above = InputGradient().loss(model, x, y, THREAT, END).total.item()
    with torch.no_grad():
        weight[0, 0, 1, 1] -= 2 * shift
    below = InputGradient().loss(model, x, y, THREAT, END).total.item()
    assert (above - below) / (2 * shift) == pytest.approx(analytic[4].item(), rel=1e-4)


class Quadratic(nn.Module):
    """Logits for which the cross-entropy of class 0 is log(1 + exp(q(x))) with q(x) = ½ k ‖x − c‖² + b·x."""

    def __init__(self, curvature: float, slope: Tensor) -> None:
        super().__init__()
        self.curvature, self.slope = nn.Parameter(torch.tensor(curvature)), nn.Parameter(slope)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        q = 0.5 * self.curvature * (flat - 0.5).square().sum(1) + flat @ self.slope
        # CE of class 0 is −log p_0; with p_0 = exp(−q') it is q' itself.
        p = torch.exp(-(q + 5))
        return torch.stack([p.log(), torch.log1p(-p)], 1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_llr_on_a_quadratic_loss(norm: str) -> None:
    """γ = ½ k ‖δ‖², largest at the border: ½ k d eps² in l_inf, ½ k eps² in l_2; the slope term is |⟨δ, b⟩|."""
    model = Quadratic(2.0, torch.tensor([0.3, -0.2, 0.1, 0.05], dtype=torch.float64)).double()
    x, y = torch.full((3, 1, 2, 2), 0.5, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    threat = Threat(norm, 0.1)
    loss = LLR(steps=4, mu=3.0, weight=4.0).loss(model, x, y, threat, END)
    expected = 0.5 * 2 * {"linf": 4 * 0.01, "l2": 0.01}[norm]
    assert loss.parts["gamma"].item() == pytest.approx(expected, rel=1e-6)
    delta = (loss.x_adv - x).flatten(1)
    slope = (delta @ model.slope).abs().mean().item()
    assert loss.parts["slope"].item() == pytest.approx(slope, rel=1e-6)
    total = F.cross_entropy(model(x), y) + 4 * expected + 3 * slope
    assert loss.total.item() == pytest.approx(total.item(), rel=1e-6)
    loss.total.backward()  # through γ to the curvature: ∂γ / ∂k = ½ ‖δ‖²
    assert model.curvature.grad.item() == pytest.approx(4 * expected / 2, rel=1e-4)


def test_cure_on_a_quadratic_loss() -> None:
    """∇CE(x + h z) − ∇CE(x) = k h z, and z has length 1."""
    model = Quadratic(2.0, torch.tensor([0.3, -0.2, 0.1, 0.05], dtype=torch.float64)).double()
    x, y = torch.full((3, 1, 2, 2), 0.5, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    loss = CURE(weight=1.0, h=0.25).loss(model, x, y, THREAT, END)
    assert loss.parts["curvature"].item() == pytest.approx((2 * 0.25) ** 2, rel=1e-6)
