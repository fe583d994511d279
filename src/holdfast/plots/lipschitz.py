"""Figure of Lipschitz constants, layer by layer."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from holdfast.plots.style import BLACK, BLUE


def constants_figure(table: pd.DataFrame) -> Figure:
    """Verified and found constant of each layer, in the order of the forward pass.

    Args:
        table: columns ``path``, ``kind``, ``verified``, ``found``.
    """
    figure = Figure(figsize=(max(4.0, 0.28 * len(table) + 1.5), 3.4), layout="constrained")
    axes = figure.subplots()
    places = range(len(table))
    axes.vlines(places, table["found"], table["verified"], color=BLUE, alpha=0.5, lw=5)
    axes.plot(places, table["verified"], "_", color=BLUE, ms=9, mew=2, label="verified")
    axes.plot(places, table["found"], "o", color=BLACK, ms=3, label="found")
    axes.set_xticks(places, table["path"] + " " + table["kind"], rotation=90, fontsize=6)
    axes.set_ylabel("Lipschitz constant, l_2")
    axes.grid(alpha=0.2, axis="y")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure
