"""Experiments: the typed recipe, running one, and the folder in which it is kept."""

from holdfast.experiments.analyze import analyze, export_run
from holdfast.experiments.experiment import EvaluationSettings, Experiment
from holdfast.experiments.folder import Run, find_run
from holdfast.experiments.recipe import recipe_names, resolve
from holdfast.experiments.run import evaluate_model, evaluate_run, load, train

__all__ = [
    "EvaluationSettings",
    "Experiment",
    "Run",
    "analyze",
    "evaluate_model",
    "evaluate_run",
    "export_run",
    "find_run",
    "load",
    "recipe_names",
    "resolve",
    "train",
]
