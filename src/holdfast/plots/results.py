"""Figures of many runs: lines, bars, points, and sandwich curves laid over one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from holdfast.numbers import leaves_range
from holdfast.plots.style import SEQUENCE

WORDS = {
    "standard": "standard accuracy",
    "attacked": "accuracy under attack",
    "certified": "certified accuracy",
    "data.train_size": "training images",
    "data.components": "principal components",
    "optimizer.lr": "learning rate",
    "threat.eps": "radius eps",
    "local_lipschitz.mean": "local Lipschitz constant found, mean",
    "objective": "training",
    "eps": "radius eps, in input units",
}
ACCURACIES = ("standard", "attacked", "certified")
STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def words(key: str) -> str:
    """A dotted name as an axis may call it."""
    return WORDS.get(key, key.replace("bracket.", "").replace("_", " ").replace(".", " "))


def lines_figure(
    table: pd.DataFrame,
    x: str,
    y: Sequence[str],
    by: Sequence[str] = (),
    *,
    log_x: bool = False,
    log_y: bool = False,
) -> Figure:
    """Means against ``x`` with 95 % bands: a colour for each combination of ``by``, a stroke for each of ``y``.

    Args:
        table: columns ``x``, those of ``by``, and of every ``y`` NAME and NAME_half.
    """
    return _points(table, x, y, by, log_x, log_y, joined=True)


def scatter_figure(
    table: pd.DataFrame,
    x: str,
    y: Sequence[str],
    by: Sequence[str] = (),
    *,
    log_x: bool = False,
    log_y: bool = False,
) -> Figure:
    """A point for each row, coloured by the combination of ``by``; arguments as of ``lines_figure``."""
    return _points(table, x, y, by, log_x, log_y, joined=False)


def _points(
    table: pd.DataFrame, x: str, y: Sequence[str], by: Sequence[str], log_x: bool, log_y: bool, *, joined: bool
) -> Figure:
    figure, axes = _axes()
    _numbers(table, [x, *y])
    for number, (label, part) in enumerate(_parts(table, by)):
        part = part.sort_values(x)
        for place, name in enumerate(y):
            if part[name].isna().all():
                continue
            turn = number // len(SEQUENCE) + place  # where the colours run out, another stroke
            colour, marker = SEQUENCE[number % len(SEQUENCE)], MARKERS[turn % len(MARKERS)]
            stroke = STYLES[turn % len(STYLES)] if joined else ""
            title = " ".join([label] if len(y) == 1 else [label, words(name)]).strip()
            axes.plot(part[x], part[name], ls=stroke, marker=marker, ms=4.5, lw=1.4, color=colour, label=title)
            half = _drawn(part, name).fillna(0)
            if joined and half.any():
                axes.fill_between(part[x], part[name] - half, part[name] + half, color=colour, alpha=0.18, lw=0)
    axes.set_xlabel(words(x))
    _finish(axes, table, x, y, log_x, log_y)
    return figure


def bars_figure(table: pd.DataFrame, x: str, y: Sequence[str], by: Sequence[str] = ()) -> Figure:
    """Groups of bars, one group for each value of ``x`` in the table's order, with 95 % intervals; arguments as of
    ``lines_figure``."""
    figure, axes = _axes(wide=True)
    places = {value: place for place, value in enumerate(dict.fromkeys(table[x]))}
    series = [(label, part, name) for label, part in _parts(table, by) for name in y if part[name].notna().any()]
    width = 0.8 / max(1, len(series))
    for number, (colour, (label, part, name)) in enumerate(zip(cycle(SEQUENCE), series, strict=False)):
        middle = [places[value] + width * (number - (len(series) - 1) / 2) for value in part[x]]
        title = " ".join([label] if len(y) == 1 else [label, words(name)]).strip()
        axes.bar(middle, part[name], width * 0.92, color=colour, label=title)
        half = _drawn(part, name)
        if half.notna().any():
            axes.errorbar(middle, part[name], half.fillna(0), ls="", color="black", capsize=2, lw=0.9)
    many = len(places) > 4
    axes.set_xticks(
        range(len(places)),
        [str(value) for value in places],
        rotation=30 if many else 0,
        ha="right" if many else "center",
    )
    axes.set_xlabel(words(x))
    _finish(axes, table, x, y, False, False, beside=len(series) > 1)
    return figure


def curves_figure(curves: Mapping[str, pd.DataFrame]) -> Figure:
    """Sandwich curves of several runs: what is certified (full) below what stood every attack (dashed).

    Args:
        curves: by the name of the run its table ``eps``, ``attacked``, ``certified``.
    """
    figure, axes = _axes()
    for colour, (label, curve) in zip(cycle(SEQUENCE), curves.items(), strict=False):
        certified, attacked = curve["certified"], curve["attacked"]
        if certified.notna().any():
            known = certified.notna()
            axes.plot(curve["eps"][known], certified[known], color=colour, marker="^", ms=3, lw=1.4, label=label)
        if attacked.notna().any():
            name = None if certified.notna().any() else label
            axes.plot(curve["eps"], attacked, color=colour, marker="v", ms=3, lw=1, ls="--", label=name)
        if certified.notna().all() and attacked.notna().all():
            axes.fill_between(curve["eps"], certified, attacked, color=colour, alpha=0.1, lw=0)
    axes.set(xlabel=words("eps"), ylabel="accuracy: certified (full), under attack (dashed)", ylim=(0, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _legend(axes)
    return figure


def _drawn(table: pd.DataFrame, name: str) -> pd.Series:
    """Half the intervals that are drawn: not those of an accuracy that leave 0 to 1, as those of two seeds may."""
    half = table[f"{name}_half"]
    return half.mask(leaves_range(name, table[name], half))


def _numbers(table: pd.DataFrame, names: Sequence[str]) -> None:
    """Refuse what has no place on an axis."""
    for name in names:
        if not pd.api.types.is_numeric_dtype(table[name]):
            raise ValueError(f"{name} is no number ({table[name].iloc[0]!r}): draw it with bars, or use it in --by")
    if table[list(names[1:])].isna().to_numpy().all():
        raise ValueError(f"no run has {', '.join(names[1:])}")


def _axes(*, wide: bool = False) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.8 if wide else 5.4, 3.7), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.2, axis="y" if wide else "both")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _parts(table: pd.DataFrame, by: Sequence[str]) -> list[tuple[str, pd.DataFrame]]:
    if not by:
        return [("", table)]
    groups = table.groupby(list(by), sort=False, dropna=False)
    return [
        (", ".join(str(part) for part in np.atleast_1d(np.array(key, dtype=object))), part) for key, part in groups
    ]


def _finish(
    axes: Axes, table: pd.DataFrame, x: str, y: Sequence[str], log_x: bool, log_y: bool, *, beside: bool = False
) -> None:
    axes.set_ylabel(
        words(y[0]) if len(y) == 1 else "accuracy" if set(y) <= set(ACCURACIES) else ", ".join(map(words, y))
    )
    if log_x:
        axes.set_xscale("log")
        values = sorted(set(table[x]))
        if len(values) <= 10:
            axes.set_xticks(values, [f"{value:g}" for value in values], rotation=30 if len(values) > 5 else 0)
            axes.minorticks_off()
    if log_y:
        axes.set_yscale("log")
    elif set(y) <= set(ACCURACIES):
        top = np.nanmax([(table[name] + _drawn(table, name).fillna(0)).max() for name in y])
        axes.set_ylim(0, 1.02 if top > 0.5 else 1.15 * max(top, 0.01))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _legend(axes, beside)


def _legend(axes: Axes, beside: bool = False) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if any(labels):
        place: dict[str, Any] = (
            {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if beside or len(labels) > 6 else {}
        )
        axes.legend(handles, labels, frameon=False, fontsize=8, **place)
