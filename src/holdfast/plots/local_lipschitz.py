"""Figure of local Lipschitz constants: their distribution, and against the margin."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from holdfast.plots.style import BLACK, BLUE, GREY


def quotient_figure(table: pd.DataFrame) -> Figure:
    """A histogram of the largest quotients, and each against its image's margin and certified radius.

    Args:
        table: columns ``quotient``, ``margin``, and ``radius`` where it is known.
    """
    certified = "radius" in table
    figure = Figure(figsize=(10.4 if certified else 7.2, 3.2), layout="constrained")
    left, right, *more = figure.subplots(1, 3 if certified else 2)
    left.hist(table["quotient"], bins=30, color=BLUE, alpha=0.6)
    left.axvline(table["quotient"].mean(), color=BLACK, lw=1)
    left.set(xlabel="largest quotient found", ylabel="images")
    right.plot(table["margin"], table["quotient"], "o", color=BLUE, ms=3, alpha=0.6, mew=0)
    right.axvline(0, color=GREY, lw=0.8)
    right.set(xlabel="margin of the logits", ylabel="largest quotient found")
    for axes in more:
        finite = table[np.isfinite(table["radius"])]
        axes.plot(finite["radius"], finite["quotient"], "o", color=BLUE, ms=3, alpha=0.6, mew=0)
        axes.set(xlabel="certified radius", ylabel="largest quotient found")
    for axes in (left, right, *more):
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
