"""Figures of the loss landscape: the band of the loss against epochs, violins of tightness."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from holdfast.plots.style import BLACK, BLUE, GREY, SEQUENCE


def band_figure(table: pd.DataFrame) -> Figure:
    """Smallest and largest loss along the gradient step, against the epoch, one band per run.

    Args:
        table: columns ``run``, ``epoch``, ``loss_low``, ``loss_high``.
    """
    figure = Figure(figsize=(5.2, 3.6))
    axes = figure.subplots()
    for colour, (name, part) in zip(SEQUENCE * len(table), table.groupby("run", sort=False), strict=False):
        axes.fill_between(
            part["epoch"], part["loss_low"], part["loss_high"], color=colour, alpha=0.4, lw=0, label=name
        )
        axes.plot(part["epoch"], part["loss_high"], color=colour, lw=0.8)
    axes.set(xlabel="epoch", ylabel="loss along the gradient step")
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


def violin_figure(table: pd.DataFrame) -> Figure:
    """Loss and sum of margin bounds over the examples, one violin per relaxation.

    Args:
        table: columns ``relaxation``, ``loss``, ``total``.
    """
    groups = list(table.groupby("relaxation", sort=False))
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    titles = {"loss": "cross-entropy of the worst margins", "total": "sum of the margins' lower bounds"}
    for axes, (column, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        bodies = axes.violinplot([part[column] for _, part in groups], showmedians=True, showextrema=False)
        for body in bodies["bodies"]:
            body.set(facecolor=BLUE, edgecolor=GREY, alpha=0.5)
        bodies["cmedians"].set(color=BLACK, lw=1)
        axes.set_xticks(
            range(1, len(groups) + 1), [name for name, _ in groups], rotation=40, ha="right", fontsize=7
        )
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.2, axis="y")
        axes.spines[["top", "right"]].set_visible(False)
    return figure
