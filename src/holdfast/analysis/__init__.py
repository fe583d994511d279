"""What explains robustness beside the accuracies."""

from holdfast.analysis.lipschitz import LayerConstant, NetworkConstant, jacobian_norm, network_constant
from holdfast.analysis.local_lipschitz import LocalLipschitz, local_lipschitz
from holdfast.analysis.loss_landscape import Landscape, loss_landscape, relaxation_tightness
from holdfast.analysis.separation import Separation, separation

__all__ = [
    "Landscape",
    "LayerConstant",
    "LocalLipschitz",
    "NetworkConstant",
    "Separation",
    "jacobian_norm",
    "local_lipschitz",
    "loss_landscape",
    "network_constant",
    "relaxation_tightness",
    "separation",
]
