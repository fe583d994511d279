"""What explains robustness beside the accuracies."""

from holdfast.analysis.loss_landscape import Landscape, loss_landscape, relaxation_tightness

__all__ = ["Landscape", "loss_landscape", "relaxation_tightness"]
