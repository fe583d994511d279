"""Analyses of runs: what a recipe can have measured while it trains, and ``holdfast analyze`` afterwards."""

from holdfast.experiments.analyses.analysis import Analysis, Findings, Subject
from holdfast.experiments.analyses.landscape import LandscapeAnalysis
from holdfast.experiments.analyses.lipschitz import LipschitzAnalysis
from holdfast.experiments.analyses.local_lipschitz import LocalLipschitzAnalysis

__all__ = ["Analysis", "Findings", "LandscapeAnalysis", "LipschitzAnalysis", "LocalLipschitzAnalysis", "Subject"]
