"""The one ascent, on functions whose maximum is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from holdfast import Threat, search
from holdfast.attacks import apgd
from holdfast.attacks.apgd import Adaptive, AdaptiveSparse
from holdfast.draws import Draws
from holdfast.search import Steepest, ascend, climb, tamed

INF = math.inf


def linear(weights: Tensor, threshold: float = INF):
    """w_i · x, finished from a threshold on."""

    def function(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        value = (weights[rows] * points).flatten(1).sum(1)
        return value, value >= threshold

    return function


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2), ("l1", INF)])
def test_reaches_the_maximum_of_a_linear_function(norm: str, dual: float) -> None:
    weights, x = torch.randn(9, 2, 4, dtype=torch.float64), torch.rand(9, 2, 4, dtype=torch.float64)
    threat = Threat(norm, 0.5, -INF, INF)
    found = ascend(linear(weights), x, Steepest(threat, 0.1), steps=40, start=lambda rows, _: x[rows], batch_size=4)
    best = (weights * x).flatten(1).sum(1) + 0.5 * weights.flatten(1).norm(dual, dim=1)
    assert torch.allclose(found.value, best, atol=1e-6)
    assert torch.allclose((weights * found.x).flatten(1).sum(1), found.value)


def test_l1_fills_one_coordinate_of_the_box_after_the_other() -> None:
    # With a box the maximum over the l_1 ball is the greedy knapsack: largest slopes first.
    weights = torch.tensor([[3.0, -2.0, 1.0]])
    x = torch.tensor([[0.5, 0.5, 0.5]])
    found = ascend(linear(weights), x, Steepest(Threat("l1", 0.8), 0.05), steps=40, start=lambda rows, _: x[rows])
    assert torch.allclose(found.x, torch.tensor([[1.0, 0.2, 0.5]]), atol=1e-5)


def test_the_batch_size_and_the_neighbours_change_nothing() -> None:
    weights, x = torch.randn(23, 5, dtype=torch.float64), torch.rand(23, 5, dtype=torch.float64)
    threat = Threat("linf", 0.3)

    def run(rows: list[int], batch_size: int | None):
        own = torch.tensor(rows)

        def start(chosen: Tensor, restart: int) -> Tensor:
            return threat.random_point(x[own[chosen]], Draws.of(restart, own[chosen]))

        function = linear(weights[own], threshold=0.9)
        return ascend(
            function, x[own], Steepest(threat, 0.05), steps=7, start=start, restarts=3, batch_size=batch_size
        )

    whole = run(list(range(23)), None)
    assert 0 < whole.finished.sum() < 23
    for batch_size in (1, 4, 22):
        part = run(list(range(23)), batch_size)
        assert torch.equal(part.x, whole.x)
        assert torch.equal(part.finished, whole.finished)
    backwards = run(list(reversed(range(23))), 5)
    assert torch.equal(backwards.x.flip(0), whole.x)


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: a number read, a shape that hangs on values."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = name == "index" and any(one is not None and one.dtype == torch.bool for one in args[1])
        masked |= name == "index_put_" and any(one is not None and one.dtype == torch.bool for one in args[1])
        self.count += masked or name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")
        return func(*args, **(kwargs or {}))


def on_a_device_that_one_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the ascent does where asking costs, on the CPU."""
    monkeypatch.setattr(search, "patience", lambda device: 8)
    for module in (search, apgd):
        monkeypatch.setattr(module, "surely_none", lambda mask: False)


RULES = {
    "steepest": lambda threat: Steepest(threat, 0.02, momentum=0.5),
    "adaptive": lambda threat: Adaptive(threat, 30),
    "sparse": lambda threat: AdaptiveSparse(threat, 30),
}


@pytest.mark.parametrize("rule", RULES)
def test_nothing_is_asked_between_the_eighth_steps(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, x = torch.randn(12, 5), torch.rand(12, 5)
    threat = Threat("l1" if rule == "sparse" else "l2", 0.3)
    counts = {}
    for steps in (8, 16, 32):
        with monkeypatch.context() as patch, Waits() as waits:
            on_a_device_that_one_waits_for(patch)
            ascend(linear(weights), x, RULES[rule](threat), steps=steps, start=lambda rows, _: x[rows])
        counts[steps] = waits.count
    assert counts[16] - counts[8] == 2  # a value that is no number? how many go on?
    assert counts[32] - counts[16] == 4


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("batch_size", [3, 10, None])
def test_asking_less_often_changes_no_verdict(
    rule: str, batch_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(31, 5, dtype=torch.float64, generator=generator)
    x = torch.rand(31, 5, dtype=torch.float64, generator=generator)
    threat = Threat("l1" if rule == "sparse" else "l2", 0.3)

    def run():
        return ascend(
            linear(weights, threshold=0.8),
            x,
            RULES[rule](threat),
            steps=13,
            start=lambda rows, restart: threat.random_point(x[rows], Draws.of(restart, rows)),
            restarts=2,
            batch_size=batch_size,
        )

    often = run()
    on_a_device_that_one_waits_for(monkeypatch)
    seldom = run()
    assert 0 < often.finished.sum() < 31
    for name, value in vars(often).items():
        assert torch.equal(value, getattr(seldom, name)), name


def test_passes_are_counted_and_finished_examples_leave() -> None:
    weights = torch.tensor([[1.0], [1.0], [1.0]])
    x = torch.tensor([[0.0], [0.5], [1.0]])
    threat = Threat("linf", 0.6, -INF, INF)
    found = ascend(
        linear(weights, threshold=1.0), x, Steepest(threat, 0.1), steps=5, start=lambda r, _: x[r], batch_size=1
    )
    assert found.finished.tolist() == [False, True, True]
    assert found.forwards.tolist() == [6, 6, 1]
    assert found.backwards.tolist() == [5, 5, 0]
    assert found.x[2] == 1.0


def test_a_budget_is_the_same_for_every_batch() -> None:
    # Example 5 would need one step more than it has; finished neighbours once kept it in the batch for more.
    x = torch.zeros(100, 1)
    threat = Threat("linf", 1.0, -INF, INF)
    goal = torch.full((100,), 0.05)
    goal[5] = 0.55

    def function(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return points[:, 0], points[:, 0] >= goal[rows]

    def run(batch_size: int):
        return ascend(
            function, x, Steepest(threat, 0.1), steps=5, start=lambda rows, _: x[rows], batch_size=batch_size
        )

    for batch_size in (1, 7, 60, 100):
        found = run(batch_size)
        assert not found.finished[5]
        assert found.forwards.tolist() == [6 if i == 5 else 2 for i in range(100)]
        assert found.backwards.tolist() == [5 if i == 5 else 1 for i in range(100)]


def test_the_best_point_of_all_restarts_is_kept() -> None:
    # Two hills: only the second restart starts on the higher one.
    def hills(points: Tensor, rows: Tensor) -> tuple[Tensor, None]:
        return torch.maximum(1 - (points - 0.2).abs(), 2 - 4 * (points - 0.8).abs()).squeeze(1), None

    x = torch.tensor([[0.5]])
    starts = [0.8, 0.2]
    found = ascend(
        hills, x, Steepest(Threat("linf", 0.5), 0.01), steps=3, start=lambda r, k: x[r] * 0 + starts[k], restarts=2
    )
    assert found.value.item() == pytest.approx(2.0, abs=0.05)
    assert found.x.item() == pytest.approx(0.8, abs=0.02)


def test_climb_ends_where_the_last_step_ends() -> None:
    weights, x = torch.randn(4, 3), torch.rand(4, 3)
    threat = Threat("linf", 0.2)
    last = climb(linear(weights), x, threat, steps=2, step_size=0.05, start=x)
    assert torch.allclose(last, (x + 0.1 * weights.sign()).clamp(0, 1))


def test_a_function_that_ignores_its_point_stays_at_the_start() -> None:
    x = torch.rand(3, 2)
    found = ascend(
        lambda points, rows: (torch.ones(len(rows)), None),
        x,
        Steepest(Threat("l2", 0.5), 0.1),
        steps=3,
        start=lambda rows, _: x[rows],
    )
    assert torch.equal(found.x, x)
    assert found.value.tolist() == [1, 1, 1]


def test_nan_is_an_error_not_a_maximum() -> None:
    x = torch.rand(2, 2)
    with pytest.raises(FloatingPointError, match="NaN"):
        ascend(
            lambda points, rows: (points.sum(1) * torch.nan, None),
            x,
            Steepest(Threat("linf", 0.1), 0.1),
            steps=1,
            start=lambda rows, _: x[rows],
        )


def test_a_tamed_gradient_keeps_the_signs_of_inf_at_the_size_of_its_largest_entry() -> None:
    gradient = torch.tensor([[1.0, -3.0, 2.0], [INF, -2.0, 1.0], [-INF, torch.nan, INF], [torch.nan, 0.0, 4.0]])
    finite, odd = tamed(gradient)
    assert finite.tolist() == [[1.0, -3.0, 2.0], [2.0, -2.0, 1.0], [-1.0, 0.0, 1.0], [0.0, 0.0, 4.0]]
    assert odd.tolist() == [False, True, True, True]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_an_infinite_gradient_of_one_example_stops_no_other_and_is_noted(norm: str) -> None:
    # The square root of an entry at 0 has the slope inf there; of the first example it is half of the way.
    x = torch.tensor([[0.0, 0.5], [0.5, 0.5], [0.5, 0.5]], dtype=torch.float64)
    found = ascend(
        lambda points, rows: ((points[:, 0].sqrt() + 0.1 * points[:, 1]).to(torch.float32), None),
        x,
        Steepest(Threat(norm, 0.3), 0.05),
        steps=30,
        start=lambda rows, _: x[rows],
    )
    assert found.odd.tolist() == [True, False, False]
    assert (found.x[:, 0] - x[:, 0]).min() > 0.2
    assert torch.equal(found.x[1], found.x[2])


def test_nothing_to_search_is_no_error() -> None:
    x = torch.rand(0, 3)
    found = ascend(
        linear(torch.zeros(0, 3)), x, Steepest(Threat("linf", 0.1), 0.1), steps=2, start=lambda rows, _: x[rows]
    )
    assert len(found.x) == 0
