"""Experiments: the typed recipe, running one or many, the folder of a run, and all runs as a table."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.experiments.experiment import EvaluationSettings, Experiment
    from holdfast.experiments.folder import Run, find_run
    from holdfast.experiments.insight import analyze, export_run
    from holdfast.experiments.recipe import recipe_names, resolve
    from holdfast.experiments.run import evaluate_model, evaluate_run, load, train

_HOME = {
    "EvaluationSettings": "experiment",
    "Experiment": "experiment",
    "Run": "folder",
    "analyze": "insight",
    "evaluate_model": "run",
    "evaluate_run": "run",
    "export_run": "insight",
    "find_run": "folder",
    "load": "run",
    "recipe_names": "recipe",
    "resolve": "recipe",
    "train": "run",
}
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


def __getattr__(name: str) -> Any:
    """Imported on first use: a list of runs is read without torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'holdfast.experiments' has no attribute {name!r}")
    return getattr(import_module(f"holdfast.experiments.{_HOME[name]}"), name)
