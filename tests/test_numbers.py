"""Means over seeds: over those that have the number, and never without saying how many."""

from __future__ import annotations

import numpy as np
import pytest

from holdfast.numbers import Mean, is_difference, is_share, leaves_range


def test_a_mean_is_over_those_that_have_the_number() -> None:
    mean = Mean.of([10.0, 20.0, float("nan")])
    assert (mean.value, mean.n) == (15, 2)
    assert mean.half == pytest.approx(12.7062 * np.std([10, 20], ddof=1) / np.sqrt(2), rel=1e-4)
    assert np.isnan(Mean.of([3.0]).half)
    assert Mean.of([float("nan")]).text("standard", 2) == "–"


@pytest.mark.parametrize(
    ("key", "values", "seeds", "text"),
    [
        ("standard", [0.9, 0.91, 0.92], 3, "91.00 ± 2.48"),
        ("standard", [0.9], 1, "90.00"),
        ("standard", [0.9], 3, "90.00 (n=1)"),
        ("attacked.pgd", [0.90, 0.94], 2, "92.00 ± 25.41 (n=2)"),
        ("bracket.certified", [0.0, 0.1, 0.0], 3, "3.33 ± 14.34 (n=3)"),
        ("gap", [0.1, -0.1], 2, "0.00 ± 127.06"),
        ("local_lipschitz.mean", [10.0, 20.0, float("nan")], 3, "15 ± 64 (n=2)"),
        ("certified_at.bounds.mean radius", [0.25, 0.27], 2, "0.26 ± 0.13"),
    ],
)
def test_a_cell_says_n_where_the_row_does_not(key: str, values: list[float], seeds: int, text: str) -> None:
    assert Mean.of(values).text(key, seeds) == text


def test_what_an_accuracy_is_and_how_far_it_goes() -> None:
    for name in ("standard", "train.standard", "last.validation_certified", "certified_at.bounds.linf:0.1"):
        assert is_share(name)
    for name in ("gap", "seconds", "threat.eps", "certified_at.bounds.mean radius", "local_lipschitz.mean"):
        assert not is_share(name)
    assert is_difference("attacked_gap")
    means, halves = np.array([0.5, 0.95]), np.array([0.4, 0.1])
    assert leaves_range("certified", means, halves).tolist() == [False, True]
    assert not np.any(leaves_range("seconds", means, halves))
