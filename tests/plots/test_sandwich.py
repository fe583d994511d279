"""The sandwich figure shows the table it is given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from holdfast import Threat
from holdfast.plots import sandwich_figure, save_figure

CURVE = pd.DataFrame(
    {"eps": [0.0, 0.1, 0.2], "standard": 0.9, "attacked": [0.9, 0.7, 0.3], "certified": [0.9, 0.5, 0.0]}
)


def test_the_lines_are_the_columns() -> None:
    axes = sandwich_figure(CURVE, Threat("linf", 0.1), examples=50).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert np.array_equal(lines["stands every attack"].get_ydata(), CURVE["attacked"])
    assert np.array_equal(lines["certified"].get_ydata(), CURVE["certified"])
    assert list(lines["standard"].get_ydata()) == [0.9, 0.9]
    assert lines["evaluated at linf:0.1"].get_xdata()[0] == 0.1
    assert axes.get_ylabel() == "accuracy on 50 images"


@pytest.mark.parametrize("missing", ["attacked", "certified"])
def test_a_side_that_was_not_computed_is_not_drawn(missing: str) -> None:
    axes = sandwich_figure(CURVE.assign(**{missing: np.nan}), Threat("l2", 0.1), examples=50).axes[0]
    assert len(axes.lines) == 3
    assert not axes.collections


def test_a_figure_is_kept_with_its_numbers(tmp_path: Path) -> None:
    save_figure(sandwich_figure(CURVE, Threat("l1", 0.1), examples=50), tmp_path / "sandwich", CURVE)
    assert (tmp_path / "sandwich.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "sandwich.pdf").read_bytes().startswith(b"%PDF")
    assert pd.read_csv(tmp_path / "sandwich.csv").equals(CURVE)
