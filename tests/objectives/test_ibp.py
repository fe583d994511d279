"""IBP training: the ramp, the reference loss and its gradients, BatchNorm in training."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from helpers import images, small_cnn
from torch import Tensor, nn

from holdfast import Threat
from holdfast.bounds import robust_cross_entropy
from holdfast.objectives import IBP, Progress


def test_robust_cross_entropy_is_that_of_the_worst_logits() -> None:
    margins = torch.randn(5, 3)
    worst = torch.cat([torch.zeros(5, 1), -margins], 1)
    expected = F.cross_entropy(worst, torch.zeros(5, dtype=torch.int64), reduction="none")
    assert torch.allclose(robust_cross_entropy(margins), expected)
    assert robust_cross_entropy(torch.tensor([[1000.0, 500.0], [-1000.0, 0.0]])).tolist() == [0.0, 1000.0]


@pytest.mark.parametrize("name", ["mlp_tiny", "cnn2_tiny"])
@pytest.mark.parametrize("k", [0, 1])
def test_loss_and_gradients_equal_the_original(
    certified_nets: dict[str, tuple[nn.Module, dict[str, Tensor]]], name: str, k: int
) -> None:
    model, arrays = certified_nets[name]
    threat = Threat("linf", arrays["eps_linf"][k].item(), -math.inf, math.inf)
    loss = IBP(kappa=0.0).loss(model, arrays["x"].double(), arrays["y"], threat, Progress.end())
    assert loss.total.item() == pytest.approx(arrays[f"linf{k}__ibp_rce"].item(), abs=1e-9)
    loss.total.backward()
    for parameter, value in model.named_parameters():
        assert torch.allclose(value.grad, arrays[f"linf{k}__ibp_rce_grad__{parameter}"], atol=1e-9)


def test_the_ramp_ends_where_it_ends() -> None:
    objective = IBP(kappa=0.25, warmup=0.2, ramp_end=0.6)
    ramps = [objective.ramp(Progress(step, 100)) for step in range(101)]
    assert ramps[:21] == [0.0] * 21
    assert ramps[40] == pytest.approx(0.5)
    assert ramps[60:] == [1.0] * 41
    assert all(a <= b for a, b in pairwise(ramps))
    assert IBP(warmup=0.5, ramp_end=0.5).ramp(Progress(5, 10)) == 1


def test_kappa_mixes_the_two_losses() -> None:
    model, (x, y), threat = small_cnn().eval(), images(8), Threat("linf", 0.05)
    loss = IBP(kappa=0.25).loss(model, x, y, threat, Progress.end())
    clean, robust = loss.parts["cross_entropy"], loss.parts["robust_cross_entropy"]
    assert robust > clean
    assert loss.total.item() == pytest.approx((0.25 * clean + 0.75 * robust).item(), abs=1e-6)


def test_batch_norm_uses_the_clean_batch_for_both_passes() -> None:
    # At radius 0 the bound of the training-mode network is the training-mode network, gradients included.
    x, y = images(16)
    model = small_cnn().train()
    model[5].p = 0.0
    robust = IBP(kappa=0.0).loss(model, x, y, Threat("linf", 0.0), Progress.end()).total
    natural = F.cross_entropy(model(x), y)
    assert robust.item() == pytest.approx(natural.item(), abs=1e-5)
    parameters = list(model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(robust, parameters), torch.autograd.grad(natural, parameters), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_batch_norm_that_is_called_twice_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm2d(1), nn.Linear(64, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(2 * self.norm(x)).flatten(1))

    x, y = images(8)
    with pytest.raises(ValueError, match="called twice"):
        IBP().loss(Twice().train(), x, y, Threat("linf", 0.1), Progress.end())


def test_probabilities_are_refused() -> None:
    x, _ = images(8)
    with pytest.raises(ValueError, match="no mixup"):
        IBP().loss(small_cnn(), x, torch.full((8, 4), 0.25), Threat("linf", 0.1), Progress.end())


def test_the_same_step_gives_the_same_gradient_bit_for_bit_with_threads() -> None:
    # Indexing the last weight by the label once added its gradient in whatever order the threads came.
    model, (x, y) = small_cnn(batch_norm=False), images(256)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        gradients = []
        for _ in range(5):
            loss = IBP(kappa=0.0).loss(model, x, y, Threat("linf", 0.1), Progress.end()).total
            gradients.append(torch.autograd.grad(loss, model[6].weight)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
