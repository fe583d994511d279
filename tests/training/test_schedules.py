"""Schedules: pure functions of the step, equal to the originals' and to torch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from holdfast.training import (
    Constant,
    Cosine,
    Linear,
    MultipleDecay,
    MultiStep,
    OneCycle,
    OneDrop,
    Piecewise,
    Schedule,
    Step,
    Superconvergent,
)

EVERY = sorted(Schedule.registry)


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


@pytest.mark.parametrize("total", [10, 37])
def test_one_cycle_is_that_of_the_data_scaling_line(
    reference: Callable[[str], dict[str, Tensor]], total: int
) -> None:
    arrays = reference("intriguing_schedule")
    cycle = OneCycle(momentum_range=(0.85, 0.95))
    rates = [cycle.factor(step, total) for step in range(total)]
    assert rates == pytest.approx(arrays[f"T{total}_lr1_lr"].tolist(), rel=1e-9)
    momenta = [cycle.momentum(step, total) for step in range(total)]
    assert momenta == pytest.approx(arrays[f"T{total}_lr1_momentum"].tolist(), rel=1e-9)
    assert OneCycle().momentum(3, total) is None


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("superconverge", Superconvergent()),
        ("piecewise", Piecewise()),
        # The original rounds its thirds of 400 epochs down to whole epochs.
        ("linear", Linear(flat=133 / 400, bend=266 / 400)),
        ("onedrop", OneDrop(at=0.25, to=0.1)),
        ("multipledecay", MultipleDecay()),
        ("cosine", Cosine()),
    ],
)
def test_values_equal_the_neural_collapse_line(
    reference: Callable[[str], dict[str, Tensor]], name: str, schedule: Schedule
) -> None:
    rates = [0.1 * schedule.factor(t, 400) for t in range(400)]
    assert rates == pytest.approx(reference("nc_lr_schedules")[name].tolist(), rel=1e-9, abs=1e-12)


def test_steps_and_milestones() -> None:
    multi = MultiStep(milestones=[0.5, 0.75], gamma=0.1)
    assert [multi.factor(t, 8) for t in range(8)] == pytest.approx([1] * 4 + [0.1] * 2 + [0.01] * 2)
    step = Step(every=0.25, gamma=0.5)
    assert [step.factor(t, 8) for t in range(8)] == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
    assert Constant().factor(3, 8) == 1


@pytest.mark.parametrize("share", [0.07, 0.14, 0.28, 0.55])
def test_a_milestone_is_not_a_rounding_error_late(share: float) -> None:
    step = round(100 * share)
    for schedule in (MultiStep(milestones=[share]), OneDrop(at=share, to=0.1)):
        assert [schedule.factor(t, 100) for t in (step - 1, step)] == [1.0, pytest.approx(0.1)]


def test_warm_up_climbs_and_a_decay_can_wait_for_the_ramp() -> None:
    warm = Constant(warmup=0.5)
    assert [warm.factor(t, 8) for t in range(8)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    waiting = Step(every=0.25, gamma=0.5, after=0.5)
    assert [waiting.factor(t, 16) for t in range(16)] == [1] * 8 + [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("total", [1, 2, 3, 4, 7, 100])
def test_every_schedule_is_a_share_at_every_step_of_any_length(name: str, total: int) -> None:
    schedule = Schedule.registry[name]()
    assert all(0 <= schedule.factor(step, total) <= 1 for step in range(total))
