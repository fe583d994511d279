"""The sandwich: certified and attacked accuracy against eps, with the gap between them shaded."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from holdfast.plots.style import BLACK, BLUE, GREY, VERMILION
from holdfast.threat import Threat

NORM_LABELS = {"linf": "$\\ell_\\infty$", "l2": "$\\ell_2$", "l1": "$\\ell_1$", "l0": "$\\ell_0$"}


def sandwich_figure(curve: pd.DataFrame, threat: Threat, *, examples: int, guarantee: str | None = None) -> Figure:
    """A figure of ``sandwich_curve``'s table; the true robust accuracy runs inside the shaded gap.

    Args:
        examples: how many it rests on.
        guarantee: of the certificates; named where it is not ``deterministic``.
    """
    figure = Figure(figsize=(5.2, 3.6))
    axes = figure.subplots()
    attacked, certified = curve["attacked"], curve["certified"]
    if attacked.notna().all() and certified.notna().all():
        axes.fill_between(curve["eps"], certified, attacked, color=GREY, alpha=0.3, lw=0, label="unknown")
    if attacked.notna().all():
        axes.plot(curve["eps"], attacked, color=VERMILION, marker="v", ms=4, label="stands every attack")
    known = certified.notna()  # sequential smoothing knows its own eps only
    if known.any():
        label = "certified" if guarantee in (None, "deterministic") else f"certified, {guarantee}"
        axes.plot(curve["eps"][known], certified[known], color=BLUE, marker="^", ms=4, label=label)
    axes.axhline(curve["standard"].iloc[0], color=BLACK, lw=0.8, ls=":", label="standard")
    axes.axvline(threat.eps, color=BLACK, lw=0.8, ls="--", label=f"evaluated at {threat}")
    axes.set(
        xlim=(0, curve["eps"].max()),
        ylim=(0, 1.02),
        xlabel=f"{NORM_LABELS[threat.norm]} radius eps, in input units",
        ylabel=f"accuracy on {examples} images",
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure
