"""Means over seeds: of what belongs together only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from holdfast.experiments.records.comparison import compare, labels
from holdfast.experiments.records.record import Record


def record(standard: float | None, seed: int = 0, **recipe: object) -> Record:
    own = {"objective": "trades", "lr": 0.1, "size": 100, **recipe}
    values = {**own, "seed": seed, "standard": standard, "validation": standard}
    return Record(Path(f"{recipe}{seed}"), "finished", values, own)


def test_seeds_are_averaged_with_an_interval() -> None:
    records = [record(0.8), record(0.9, 1), record(0.5, size=10), Record(Path("x"), "begun", {"standard": 0.1})]
    table = compare(records, y=["standard"], by=["size"]).set_index("size")
    assert table.loc[100, "standard"] == pytest.approx(0.85)
    assert table.loc[100, "seeds"] == 2
    assert table.loc[100, "standard_half"] == pytest.approx(
        12.706 * np.std([0.8, 0.9], ddof=1) / np.sqrt(2), rel=1e-3
    )
    assert np.isnan(table.loc[10, "standard_half"])


def test_the_same_experiment_counts_once() -> None:
    table = compare([record(0.8), record(0.8), record(0.9, 1)], y=["standard"])
    assert table["seeds"].item() == 2
    assert table["standard"].item() == pytest.approx(0.85)


def test_a_mean_over_different_experiments_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 experiments with size=100 differ in lr: .*--best"):
        compare([record(0.8), record(0.7, lr=0.2)], y=["standard"], by=["size"])


def test_the_best_of_several_is_chosen_by_its_mean() -> None:
    records = [record(0.80), record(0.82, 1), record(0.95, lr=1), record(0.55, 1, lr=1), record(0.3, size=10)]
    table = compare(records, y=["standard", "lr"], by=["size"], best="validation").set_index("size")
    assert table.loc[100, "lr"] == 0.1
    assert table.loc[100, "standard"] == pytest.approx(0.81)
    worst = compare(records, y=["standard", "lr"], by=["size"], best="-validation").set_index("size")
    assert worst.loc[100, "lr"] == 1


def test_what_lacks_one_number_keeps_its_row() -> None:
    lacking = record(None, size=10)
    table = compare([record(0.8), lacking], y=["standard", "lr"], by=["size"]).set_index("size")
    assert np.isnan(table.loc[10, "standard"])
    assert table.loc[10, "lr"] == 0.1


def test_an_unknown_goal_is_the_worst_and_an_empty_setting_a_row() -> None:
    unknown, known = record(0.2, lr=1), record(0.9)
    unknown.values["validation"] = float("nan")
    for records in ([unknown, known], [known, unknown]):
        assert compare(records, y=["standard"], by=["size"], best="validation")["standard"].item() == 0.9
    table = compare([record(0.8, size=None), record(0.7)], y=["standard"], by=["size"])
    assert dict(zip(table["size"], table["standard"], strict=True)) == {"none": 0.8, 100: 0.7}


def test_what_cannot_be_compared_is_told() -> None:
    with pytest.raises(ValueError, match="no finished runs"):
        compare([], y=["standard"])
    with pytest.raises(ValueError, match=r"did you mean 'standard'"):
        compare([record(0.8)], y=["standrd"])
    with pytest.raises(ValueError, match="is no number: 'trades'"):
        compare([record(0.8)], y=["objective"])


def test_a_label_is_the_name_and_what_tells_namesakes_apart() -> None:
    inner = {"objective.name": "awp", "objective.objective.name": "trades", "objective.objective": "trades"}
    records = [
        record(0.8, objective="trades", **{"objective.beta": 1.0, "objective.steps": 5}),
        record(0.8, objective="trades", **{"objective.beta": 6.0, "objective.steps": 5}),
        record(0.8, objective="awp", **inner),
    ]
    assert labels(records, "objective") == ["trades(beta=1.0)", "trades(beta=6.0)", "awp"]
