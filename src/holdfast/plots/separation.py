"""Figures of class separation: histograms of the distances, and the closest pairs as pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from holdfast.plots.sandwich import NORM_LABELS
from holdfast.plots.style import BLACK, BLUE, VERMILION
from holdfast.threat import Threat


def distances_figure(table: pd.DataFrame, threat: Threat) -> Figure:
    """Histograms of the distance to the nearest other class, and where 2 eps is.

    Args:
        table: columns ``part``, ``distance``.
    """
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    finite = table[np.isfinite(table["distance"])]
    most = max(1e-12, finite["distance"].max() if len(finite) else 1.0, 2 * threat.eps)
    bins = np.linspace(0, most * 1.02, 41).tolist()
    for colour, (part, frame) in zip((BLUE, VERMILION), finite.groupby("part", sort=False), strict=False):
        axes.hist(
            frame["distance"],
            bins=bins,
            color=colour,
            alpha=0.5,
            weights=np.full(len(frame), 1 / len(frame)),
            label=f"{part} – train, min {frame['distance'].min():.3g}",
        )
    if threat.eps:
        axes.axvline(2 * threat.eps, color=BLACK, lw=1, ls="--", label=f"2 eps = {2 * threat.eps:.3g}")
    axes.set(xlabel=f"{NORM_LABELS[threat.norm]} distance to the nearest other class", ylabel="share of images")
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


def pairs_figure(table: pd.DataFrame, pictures: Sequence[tuple[Tensor, Tensor]], classes: Sequence[str]) -> Figure:
    """The closest pairs, image above neighbour.

    Args:
        table: columns ``part``, ``index``, ``label``, ``distance``, ``neighbour``, ``neighbour_label``.
        pictures: (neighbour, image) of each row, (C, H, W) in [0, 1].
    """
    rows = table.to_dict("records")
    parts = [[i for i, row in enumerate(rows) if row["part"] == part][:10] for part in table["part"].unique()]
    columns = max(map(len, parts))
    figure = Figure(figsize=(1.15 * columns + 0.4, 3.1 * len(parts)), layout="constrained")
    grid = figure.subplots(2 * len(parts), columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for band, numbers in enumerate(parts):
        for column, number in enumerate(numbers):
            row, (neighbour, image) = rows[number], pictures[number]
            titles = (
                f"{row['part']} {row['index']}\n{classes[row['label']]}",
                f"train {row['neighbour']}\n{classes[row['neighbour_label']]}, at {row['distance']:.3g}",
            )
            for line, (picture, title) in enumerate(zip((image, neighbour), titles, strict=True)):
                axes = grid[2 * band + line, column]
                axes.imshow(picture.permute(1, 2, 0).squeeze().numpy(), cmap="gray", vmin=0, vmax=1)
                axes.set_title(title, fontsize=6)
    return figure


def radii_figure(table: pd.DataFrame) -> Figure:
    """For each image the radius certified below and the distance found above.

    Args:
        table: columns ``correct``, ``certified``, ``found``.
    """
    figure = Figure(figsize=(4.4, 3.8), layout="constrained")
    axes = figure.subplots()
    right = table[table["correct"] & np.isfinite(table["found"])]
    axes.plot(right["certified"], right["found"], "o", color=BLUE, ms=3, alpha=0.6, mew=0)
    most = float(right["found"].max()) if len(right) else 1.0
    axes.plot([0, most], [0, most], color=BLACK, lw=0.8, label="nothing can lie below")
    axes.set(xlabel="certified radius", ylabel="distance of the nearest error found")
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure
