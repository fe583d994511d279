"""Schedules: pure functions of the step."""

from __future__ import annotations

import pytest
import torch

from holdfast.training import Constant, OneCycle, Step


@pytest.mark.parametrize(("total", "peak"), [(100, 0.3), (37, 0.5), (10, 0.25)])
def test_one_cycle_is_torchs(total: int, peak: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    torchs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=2.0, total_steps=total, pct_start=peak, final_div_factor=1e4
    )
    ours = OneCycle(peak=peak)
    for step in range(total):
        assert 2.0 * ours.factor(step, total) == pytest.approx(torchs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        if step + 1 < total:
            torchs.step()


def test_step_and_constant() -> None:
    step = Step(milestones=[0.5, 0.75], gamma=0.1)
    assert [step.factor(t, 8) for t in range(8)] == pytest.approx([1] * 4 + [0.1] * 2 + [0.01] * 2)
    assert Constant().factor(3, 8) == 1


@pytest.mark.parametrize("total", [1, 2, 3, 4, 7])
def test_short_trainings_have_a_rate_too(total: int) -> None:
    assert all(0 < OneCycle().factor(step, total) <= 1 for step in range(total))
