"""The staircase: the stairs, and the fits to few points and to many."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from holdfast.plots.style import BLACK, GREY, SEQUENCE


def staircase_figure(curves: pd.DataFrame, stairs: Sequence[float], shift: float, shown: Sequence[str]) -> Figure:
    """The fits of some methods, one panel for each size of the sample.

    Args:
        curves: columns ``points``, ``method``, ``x``, ``f``.
        shift: how far the adversary moves a point.
    """
    panels = list(curves.groupby("points"))
    figure = Figure(figsize=(5.2 * len(panels), 3.8), layout="constrained")
    for axes, (size, frame) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for stair in stairs:
            axes.plot([stair - shift, stair + shift], [stair, stair], color=GREY, lw=3, alpha=0.5)
        for colour, name in zip([BLACK, *SEQUENCE], shown, strict=False):
            one = frame[frame["method"] == name]
            axes.plot(one["x"], one["f"], color=colour, lw=1.2, label=name)
        axes.set(xlabel="x", ylabel="f(x)", title=f"{size} points", ylim=(-1.5, 11))
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure
