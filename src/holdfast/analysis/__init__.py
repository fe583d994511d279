"""What explains robustness beside the accuracies."""

from holdfast.analysis.attack_check import AttackCheck, attack_check
from holdfast.analysis.collapse_metrics import NeuralCollapse
from holdfast.analysis.lipschitz import LayerConstant, NetworkConstant, jacobian_norm, network_constant
from holdfast.analysis.local_lipschitz import LocalLipschitz, local_lipschitz
from holdfast.analysis.loss_landscape import Landscape, loss_landscape, relaxation_tightness
from holdfast.analysis.neural_collapse import CollapseMeter, neural_collapse
from holdfast.analysis.separation import Separation, separation
from holdfast.analysis.simplex import SimplexComparison, compare_simplices, leap_matrix

__all__ = [
    "AttackCheck",
    "CollapseMeter",
    "Landscape",
    "LayerConstant",
    "LocalLipschitz",
    "NetworkConstant",
    "NeuralCollapse",
    "Separation",
    "SimplexComparison",
    "attack_check",
    "compare_simplices",
    "jacobian_norm",
    "leap_matrix",
    "local_lipschitz",
    "loss_landscape",
    "network_constant",
    "neural_collapse",
    "relaxation_tightness",
    "separation",
]
