"""Analyses of runs: what a recipe can have measured while it trains, and ``holdfast analyze`` afterwards."""

from holdfast.experiments.analyses.analysis import Analysis, DataAnalysis, Findings, ModelAnalysis, Subject
from holdfast.experiments.analyses.attack_check import AttackCheckAnalysis
from holdfast.experiments.analyses.landscape import LandscapeAnalysis
from holdfast.experiments.analyses.lipschitz import LipschitzAnalysis
from holdfast.experiments.analyses.local_lipschitz import LocalLipschitzAnalysis
from holdfast.experiments.analyses.nearest_neighbour import NearestNeighbourAnalysis
from holdfast.experiments.analyses.neural_collapse import NeuralCollapseAnalysis
from holdfast.experiments.analyses.separation import SeparationAnalysis

__all__ = [
    "Analysis",
    "AttackCheckAnalysis",
    "DataAnalysis",
    "Findings",
    "LandscapeAnalysis",
    "LipschitzAnalysis",
    "LocalLipschitzAnalysis",
    "ModelAnalysis",
    "NearestNeighbourAnalysis",
    "NeuralCollapseAnalysis",
    "SeparationAnalysis",
    "Subject",
]
