"""Figures of many runs show what their tables hold."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from holdfast.plots import save_figure
from holdfast.plots.results import bars_figure, curves_figure, lines_figure, scatter_figure, words


@pytest.fixture
def table() -> pd.DataFrame:
    rows = [
        (objective, size, 0.5 + 0.1 * i, 0.02 * j if j else math.nan)
        for j, objective in enumerate(("ibp", "trades"))
        for i, size in enumerate((1000, 10, 100))
    ]
    return pd.DataFrame(rows, columns=["objective", "data.train_size", "certified", "certified_half"])


def test_lines_run_from_left_to_right_with_bands_where_there_are_seeds(table: pd.DataFrame) -> None:
    (axes,) = lines_figure(table, "data.train_size", ["certified"], ["objective"], log_x=True).axes
    assert [line.get_label() for line in axes.lines] == ["ibp", "trades"]
    for line in axes.lines:
        assert np.array_equal(line.get_xdata(), [10, 100, 1000])
        assert np.allclose(line.get_ydata(), [0.6, 0.7, 0.5])
    assert len(axes.collections) == 1
    low, high = (
        axes.collections[0].get_paths()[0].vertices[:, 1].min(),
        axes.collections[0].get_paths()[0].vertices[:, 1].max(),
    )
    assert (low, high) == pytest.approx((0.48, 0.72))
    assert axes.get_xscale() == "log"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("training images", "certified accuracy")


def test_bars_stand_in_their_groups(table: pd.DataFrame) -> None:
    (axes,) = bars_figure(table, "data.train_size", ["certified"], ["objective"]).axes
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == pytest.approx([0.5, 0.6, 0.7, 0.5, 0.6, 0.7])
    centres = [bar.get_x() + bar.get_width() / 2 for bar in axes.patches]
    assert [round(centre) for centre in centres] == [0, 1, 2, 0, 1, 2]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1000", "10", "100"]


def test_points_and_curves(table: pd.DataFrame, tmp_path: Path) -> None:
    (axes,) = scatter_figure(table, "data.train_size", ["certified"], ["objective"], log_x=True, log_y=True).axes
    assert [len(line.get_xdata()) for line in axes.lines] == [3, 3]
    assert axes.get_yscale() == "log"
    curve = pd.DataFrame({"eps": [0.0, 0.1], "attacked": [0.9, 0.6], "certified": [0.9, 0.4]})
    figure = curves_figure({"ibp": curve, "trades": curve.assign(certified=math.nan)})
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["ibp", "trades"]
    assert len(axes.lines) == 3
    save_figure(figure, tmp_path / "curve", curve)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".pdf", ".png", ".svg"]


def test_axes_are_labelled_in_words() -> None:
    assert words("optimizer.lr") == "learning rate"
    assert words("last.validation_certified") == "last validation certified"


def test_an_interval_that_no_accuracy_can_have_is_not_drawn(table: pd.DataFrame) -> None:
    table.loc[table["objective"] == "trades", "certified_half"] = [0.1, 0.1, 0.7]
    (axes,) = lines_figure(table, "data.train_size", ["certified"], ["objective"]).axes
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.4, 0.7))
    assert axes.get_ylim()[1] <= 1.02
