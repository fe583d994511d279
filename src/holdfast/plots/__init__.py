"""Pure functions from tables to figures."""

from holdfast.plots.sandwich import sandwich_figure
from holdfast.plots.style import save_figure

__all__ = ["sandwich_figure", "save_figure"]
