"""Experiment: the typed recipe of one run."""

from __future__ import annotations

import hashlib
import json

from pydantic import Field, NonNegativeInt, PositiveInt

from holdfast.attacks import PGD, Attack
from holdfast.certify import BoundCertifier, Certifier
from holdfast.component import Number, Settings, distinct_labels
from holdfast.data import Data
from holdfast.experiments.analyses import Analysis
from holdfast.models import Model
from holdfast.objectives import Objective
from holdfast.threat import Threat
from holdfast.training import Adam, Constant, Optimizer, Schedule, Training
from holdfast.training.engine import Engine


class EvaluationSettings(Settings):
    """What is asked of the trained model."""

    attacks: list[Attack] = [PGD()]
    """Attacks on the test images, each run on its own."""
    certifiers: list[Certifier] = [BoundCertifier()]
    """Certifiers of the test images."""
    examples: PositiveInt | None = None
    """Evaluate the first so many test images; all by default."""
    train_examples: NonNegativeInt = 200
    """Attack the first so many training images as well: how far training and test lie apart."""
    lipschitz_examples: NonNegativeInt = 200
    """Measure the local Lipschitz constant around the first so many test images, and training images."""
    radii: list[Number] = []
    """Report certified accuracy at these radii, too, from the radius of each example: ``[36/255, 72/255]``."""
    audit: float = Field(default=0.1, ge=0, le=1)
    """Share of the certified examples that are attacked all the same, to test the certificates."""
    batch_size: PositiveInt = 256
    """Images per forward pass."""
    keep_adversarial: NonNegativeInt = 1000
    """Keep so many adversarial examples of each attack in the run folder."""
    curve_points: NonNegativeInt = 8
    """Radii of the sandwich curve, evenly spaced up to twice eps; 0 for no curve."""
    curve_examples: PositiveInt = 500
    """The curve rests on the first so many of the evaluated images."""


class Experiment(Settings):
    """Everything that determines a run."""

    data: Data
    """Data set."""
    model: Model
    """Architecture."""
    threat: Threat
    """Threat model of training and evaluation, such as ``linf:8/255``."""
    objective: Objective | None = None
    """Training loss; none where a model is evaluated only."""
    optimizer: Optimizer = Adam()
    """Optimiser."""
    schedule: Schedule = Constant()
    """Learning-rate schedule."""
    training: Training = Training()
    """How long and in what portions."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """What is asked of the trained model."""
    analysis: list[Analysis] = []
    """What is measured while the model is trained."""
    engine: Engine = Engine()
    """Where it runs."""
    seed: NonNegativeInt = 0
    """Seed of initialisation, order, augmentation and attacks."""

    def model_post_init(self, context: object) -> None:
        for certifier in self.evaluation.certifiers if self.evaluation.radii else ():
            if not certifier.knows_radii:
                raise ValueError(
                    "evaluation.radii reads the radius of each example, but sequential smoothing stops as soon as "
                    "eps is decided: give it a tolerance, or mode=fixed"
                )
        names = [one.name for one in self.analysis]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"analysis: {name} stands there twice; it takes several collections and layers at once"
                )
        inner = getattr(self.objective, "objective", self.objective)
        if self.training.averaging and getattr(inner, "frozen_statistics", False):
            raise ValueError(
                "training.averaging takes BatchNorm's statistics anew, objective.frozen_statistics keeps those of "
                "the start: they exclude one another"
            )
        for one in self.analysis:
            if type(one).watch is Analysis.watch:
                raise ValueError(f"{one.name} sees nothing of a training: holdfast analyze ... {one.name}")
        distinct_labels(self.evaluation.attacks)
        distinct_labels(self.evaluation.certifiers)

    @property
    def identity(self) -> str:
        """A hash of the resolved recipe: the name of its run folder."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]
