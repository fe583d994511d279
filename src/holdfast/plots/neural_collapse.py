"""Figures of neural collapse: metrics against the epoch, leaps and angles between class means, layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from holdfast.plots.style import SEQUENCE

STROKES = ("-", "--", ":", "-.")
PANELS = {
    "nc1": "NC1: spread within over between",
    "nc2_norm_means": "NC2: lengths of the means",
    "nc2_angle_means": "NC2: angles of the means",
    "nc3": "NC3: classifier against means",
    "nc4": "NC4: network against nearest mean",
    "ncc_accuracy_clean_centres": "accuracy of the nearest clean mean",
}


def collapse_figure(table: pd.DataFrame, layer: str) -> Figure:
    """One panel per metric against the epoch, one colour per collection; mean and range over runs that were trained
    alike, a stroke for each way of training.

    Args:
        table: columns ``run`` (how it was trained, and its name in brackets), ``epoch``, ``collection``, ``layer``,
            ``metric``, ``class``, ``value``.
        layer: the one that is drawn.
    """
    rows = table[(table["layer"] == layer) & table["class"].isna()]
    rows = rows.assign(training=rows["run"].str.replace(r" \([0-9a-f]+\)$", "", regex=True))
    trainings = list(rows["training"].unique())
    lines = [(one, how) for how in trainings for one in rows.loc[rows["training"] == how, "collection"].unique()]
    colours = dict(zip(rows["collection"].unique(), SEQUENCE * 3, strict=False))
    figure = Figure(figsize=(10.5, 5.6), layout="constrained")
    for axes, (metric, title) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        for collection, how in lines:
            one = rows[(rows["metric"] == metric) & (rows["collection"] == collection) & (rows["training"] == how)]
            if len(one):
                by_epoch = one.groupby("epoch")["value"].agg(["mean", "min", "max"])
                stroke = {"color": colours[collection], "ls": STROKES[trainings.index(how) % len(STROKES)]}
                label = f"{collection}, {how}" if len(trainings) > 1 else collection
                axes.plot(by_epoch.index, by_epoch["mean"], marker=".", ms=3, lw=1.2, label=label, **stroke)
                colour = colours[collection]
                axes.fill_between(by_epoch.index, by_epoch["min"], by_epoch["max"], color=colour, alpha=0.2, lw=0)
        values = rows.loc[rows["metric"] == metric, "value"]
        if metric in ("nc1", "nc3") and len(values) and values.min() > 0:
            axes.set_yscale("log")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("epoch", fontsize=8)
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, frameon=False, fontsize=8, ncols=min(len(lines), 4), loc="outside upper center")
    return figure


def matrices_figure(table: pd.DataFrame) -> Figure:
    """Heat maps: leaps from each class to the nearest clean mean, and angles between class means and clean ones.

    Args:
        table: columns ``collection``, ``matrix``, ``row``, ``column``, ``value``.
    """
    collections = list(table["collection"].unique())
    figure = Figure(figsize=(2.9 * len(collections) + 0.8, 5.8), layout="constrained")
    grid = figure.subplots(2, len(collections), squeeze=False)
    words = {
        "leap": ("share that lies nearest to", 1.0, "Blues"),
        "angle": ("angle to, in degrees", 180.0, "viridis"),
    }
    for line, (matrix, (label, most, colours)) in zip(grid, words.items(), strict=True):
        for axes, collection in zip(line, collections, strict=True):
            part = table[(table["matrix"] == matrix) & (table["collection"] == collection)]
            values = part.pivot(index="row", columns="column", values="value").to_numpy()
            image = axes.imshow(values, vmin=0, vmax=most, cmap=colours)
            axes.set_title(collection, fontsize=9)
            axes.set(xlabel="clean mean of class", ylabel="class" if axes is line[0] else "")
            if len(values) <= 10:
                axes.set_xticks(range(len(values)))
                axes.set_yticks(range(len(values)))
            axes.tick_params(labelsize=7)
        figure.colorbar(image, ax=list(line), label=label, shrink=0.8)
    return figure


def layers_figure(table: pd.DataFrame, order: Sequence[str]) -> Figure:
    """Metrics against the depth, one line per collection.

    Args:
        table: columns ``collection``, ``layer``, ``metric``, ``class``, ``value``.
        order: the layers, first to last.
    """
    titles = {
        "nc1": "NC1",
        "nc2_angle_means": "NC2: angles",
        "ncc_accuracy": "accuracy of the nearest mean",
        "ncc_accuracy_clean_centres": "of the nearest clean mean",
    }
    rows = table[table["class"].isna()]
    figure = Figure(figsize=(3.0 * len(titles), 3.3), layout="constrained")
    for axes, (metric, title) in zip(figure.subplots(1, len(titles)), titles.items(), strict=True):
        for colour, collection in zip(SEQUENCE * 2, rows["collection"].unique(), strict=False):
            one = rows[(rows["metric"] == metric) & (rows["collection"] == collection)].set_index("layer")["value"]
            heights = [one.get(layer, np.nan) for layer in order]
            axes.plot(range(len(order)), heights, color=colour, marker="o", ms=3, lw=1.2, label=collection)
        if metric == "nc1":
            axes.set_yscale("log")
        axes.set_xticks(range(len(order)), order, rotation=60, ha="right", fontsize=7)
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure
