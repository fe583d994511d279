"""Experiments: the typed recipe, running one or many, the folder of a run, and all runs as a table."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.experiments.recipes.experiment import EvaluationSettings, Experiment
    from holdfast.experiments.recipes.overrides import recipe_names, resolve
    from holdfast.experiments.runs.analysis import analyze, export_run
    from holdfast.experiments.runs.audit import audit_run
    from holdfast.experiments.runs.evaluation import evaluate_model, evaluate_run
    from holdfast.experiments.runs.folder import Run, find_run
    from holdfast.experiments.runs.training import load, train

_HOME = {
    "EvaluationSettings": "recipes.experiment",
    "Experiment": "recipes.experiment",
    "Run": "runs.folder",
    "analyze": "runs.analysis",
    "audit_run": "runs.audit",
    "evaluate_model": "runs.evaluation",
    "evaluate_run": "runs.evaluation",
    "export_run": "runs.analysis",
    "find_run": "runs.folder",
    "load": "runs.training",
    "recipe_names": "recipes.overrides",
    "resolve": "recipes.overrides",
    "train": "runs.training",
}
__all__ = [
    "EvaluationSettings",
    "Experiment",
    "Run",
    "analyze",
    "audit_run",
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
