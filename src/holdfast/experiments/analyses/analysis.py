"""Analysis: something measured while a model is trained, of a trained one, or of a data set."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from torch import Tensor, nn

from holdfast.attacks import Attack
from holdfast.component import Component
from holdfast.data import Images
from holdfast.objectives import Objective, Progress
from holdfast.threat import Threat
from holdfast.training import Observer, Reporter


@dataclass(frozen=True)
class Subject:
    """A trained model and what is known of its training."""

    model: nn.Module
    x: Tensor
    """Test images, (N, ...)."""
    y: Tensor
    threat: Threat
    train: Images
    """What it was trained on."""
    objective: Objective | None
    lr: float
    """Learning rate at the start."""
    title: str = ""
    """What it is called among the histories."""
    epoch: int = 0
    """The epoch whose weights it has; the last where they are an average."""
    kept: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """Weights of earlier epochs that were kept."""
    examples: pd.DataFrame | None = None
    """The per-example table of the run's evaluation, where its threat has the same norm."""
    attacks: list[Attack] = field(default_factory=list)
    """Of the run's evaluation."""
    histories: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Of this run and of others to compare with, by the names to show."""


@dataclass(frozen=True)
class Findings:
    """What an analysis found."""

    summary: list[tuple[str, str]]
    """Lines of the table that is shown."""
    tables: dict[str, pd.DataFrame]
    """Tidy tables, by the names of their files."""
    figures: dict[str, tuple[Callable[[pd.DataFrame], Any], str]]
    """By the name of the file: what draws it, and the table it is drawn from."""


class Analysis(Component, family="analyses"):
    """Measures a trained model, some of it while it is trained, or a data set."""

    def watch(
        self, model: nn.Module, objective: Objective, threat: Threat, rate: Callable[[Progress], float]
    ) -> Observer | None:
        """What looks on while the model is trained; None where there is nothing to see.

        Args:
            rate: the learning rate of a step.
        """
        return None

    def rehearse(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> None:
        """Measure two images, so that what cannot work while training fails before it.

        Raises:
            ValueError: it cannot.
        """

    def table(self, history: list[dict[str, Any]]) -> pd.DataFrame | None:
        """What was seen of a training, tidy, for the run's folder; None where the history says it all."""
        return None


class ModelAnalysis(Analysis):
    """Measures a trained model."""

    @abstractmethod
    def of(self, subject: Subject) -> Findings:
        """Measure a trained model."""


class DataAnalysis(Analysis):
    """Measures a data set, whoever is trained on it."""

    @abstractmethod
    def of(self, train: Images, test: Images, threat: Threat, reporter: Reporter) -> Findings:
        """Measure a data set: its published training and test parts, whole."""
