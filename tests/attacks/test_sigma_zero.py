"""σ-zero on linear models, where the fewest entries that change the answer are known."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import images, linear_model, small_cnn
from torch import Tensor, nn

from holdfast import Threat
from holdfast.attacks import FMN, SigmaZero
from holdfast.attacks.sigma_zero import smooth_count


def fewest(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Entries of largest gain within the box that a linear model of two classes needs, (N,)."""
    weight = (model[-1].weight[1] - model[-1].weight[0]).detach() * (1 - 2 * y[:, None])
    gains = weight.abs() * torch.where(weight > 0, 1 - x.flatten(1), x.flatten(1))
    missing = (model(x)[:, 0] - model(x)[:, 1]).abs()
    return (gains.sort(dim=1, descending=True).values.cumsum(1) < missing[:, None]).sum(1) + 1


def test_it_finds_the_fewest_entries_of_a_linear_model() -> None:
    model = linear_model(classes=2, shape=(1, 4, 5)).double()
    x = torch.rand(24, 1, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    needed = fewest(model, x, y)
    assert needed.unique().numel() > 2
    result = SigmaZero(steps=300)(model, x, y, Threat("l0", 3))
    assert (result.distance >= needed).all()
    assert (result.distance <= needed + 1).double().mean() > 0.9
    assert torch.equal(result.success, result.distance <= 3)
    assert (result.forwards == 1 + 301 + 1).all()
    assert (result.backwards == 300).all()


def test_it_changes_no_more_than_fmn_at_equal_passes() -> None:
    model, (x, _) = small_cnn().eval(), images(30)
    y, threat = model(x).argmax(1), Threat("l0", 8)
    ours, fmn = (attack(model, x, y, threat) for attack in (SigmaZero(steps=100), FMN(steps=100)))
    assert ours.distance.mean() <= fmn.distance.mean()
    assert torch.equal(ours.distance, (ours.x_adv != x).flatten(1).sum(1).float())


def test_it_needs_no_box() -> None:
    model = linear_model(classes=2, shape=(1, 4, 5)).double()
    x = torch.rand(6, 1, 4, 5, dtype=torch.float64)
    result = SigmaZero(steps=100)(model, x, model(x).argmax(1), Threat("l0", 1, -math.inf, math.inf))
    assert (result.distance == 1).all()  # where an entry may go anywhere one is enough


def test_the_smooth_count_is_the_number_of_entries_in_the_limit() -> None:
    delta = torch.tensor([[0.0, 0.5, -1.0], [0.0, 0.0, 1e-2]])
    assert smooth_count(delta, 0.25).tolist() == pytest.approx([0.5 + 0.8, 1e-4 / (1e-4 + 0.25)])
    assert smooth_count(delta, 1e-12).tolist() == pytest.approx([2.0, 1.0])


def test_other_norms_are_refused_in_a_sentence() -> None:
    x, _ = images(4)
    y = small_cnn().eval()(x).argmax(1)
    with pytest.raises(
        ValueError, match="sigma-zero counts changed entries and has no form for l2; attack it with fmn"
    ):
        SigmaZero()(small_cnn(), x, y, Threat("l2", 1.0))
