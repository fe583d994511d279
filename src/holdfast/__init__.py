"""Train, attack, certify and understand classifiers that hold fast under perturbation."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.evaluation import evaluate
    from holdfast.experiments import load, train
    from holdfast.threat import Threat

__version__ = "0.2.0"
__all__ = ["Threat", "__version__", "evaluate", "load", "train"]

_HOME = {
    "Threat": "holdfast.threat",
    "evaluate": "holdfast.evaluation",
    "load": "holdfast.experiments",
    "train": "holdfast.experiments",
}


def __getattr__(name: str) -> Any:
    """Public names are imported on first use, so that the command line can answer without torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'holdfast' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
