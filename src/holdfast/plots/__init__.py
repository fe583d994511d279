"""Pure functions from tables to figures."""

from holdfast.plots.contact_sheet import contact_sheet
from holdfast.plots.sandwich import sandwich_figure
from holdfast.plots.style import save_figure

__all__ = ["contact_sheet", "sandwich_figure", "save_figure"]
