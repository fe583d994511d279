"""What explains robustness beside the accuracies."""

from holdfast.analysis.lipschitz import LayerConstant, NetworkConstant, jacobian_norm, network_constant
from holdfast.analysis.loss_landscape import Landscape, loss_landscape, relaxation_tightness

__all__ = [
    "Landscape",
    "LayerConstant",
    "NetworkConstant",
    "jacobian_norm",
    "loss_landscape",
    "network_constant",
    "relaxation_tightness",
]
