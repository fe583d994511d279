"""What all figures share: colours that colour-blind readers can tell apart, and how a figure is kept."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from holdfast.files import whole_file, write_text

BLUE, VERMILION, GREY, BLACK = "#0072B2", "#D55E00", "#999999", "#000000"
SEQUENCE = [BLUE, VERMILION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]


def save_figure(figure: Figure, stem: Path, table: pd.DataFrame) -> None:
    """The figure as PNG, PDF and SVG and the plotted numbers as CSV: ``stem``.png, .pdf, .svg, .csv."""
    figure.draw_without_rendering()  # lay out once, not for every file
    figure.set_layout_engine("none")
    box = figure.get_tightbbox().padded(0.1)
    for suffix in (".png", ".pdf", ".svg"):
        with whole_file(stem.with_suffix(suffix)) as temporary:
            figure.savefig(temporary, dpi=160, bbox_inches=box)
    write_text(stem.with_suffix(".csv"), table.to_csv(index=False))
