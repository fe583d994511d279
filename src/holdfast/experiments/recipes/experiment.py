"""Experiment: the typed recipe of one run."""

from __future__ import annotations

from typing import Any

from pydantic import Field, NonNegativeInt, PositiveInt

import holdfast.formats  # noqa: F401  (its networks are models of a recipe)
from holdfast.attacks import Attack, default_attack
from holdfast.certify import BoundCertifier, Certifier
from holdfast.component import Number, PositiveNumber, Settings, distinct_labels
from holdfast.data import Data
from holdfast.experiments.analyses import Analysis
from holdfast.experiments.recipes.sparse import digest, plain, sparse
from holdfast.experiments.schema import ANSWERS_ALIKE_SINCE, TRAINS_ALIKE_SINCE
from holdfast.models import Model
from holdfast.objectives import Objective
from holdfast.threat import Threat
from holdfast.training import Adam, Constant, Optimizer, Schedule, Training
from holdfast.training.engine import Engine

NOT_OF_THE_WEIGHTS = frozenset({"checkpoint_every", "keep_every"})
"""Settings of the training that say what is kept of it."""
NOT_WATCHED = frozenset({"validate_every", "validation_examples"})
"""Settings of the training that decide its weights where a validation is watched only."""
NOT_ASKED = frozenset(
    {"batch_size", "minutes", "keep_adversarial", "curve_points", "curve_examples", "threat", "data"}
)
"""Settings of the evaluation that change no answer: in what pieces, what is kept and drawn. (Threat and data are
told apart by what they come to.)"""
NOT_TESTED = frozenset({"root", "train_size", "validation", "split_seed"})
"""Settings of data that change no test image."""


class EvaluationSettings(Settings):
    """What is asked of the trained model."""

    threat: Threat | None = None
    """Threat model of the evaluation; that of the training by default."""
    data: Data | None = None
    """Evaluate on the test images of other data, of the same shape and classes; those of the training's by
    default."""
    attacks: list[Attack] = [default_attack()]
    """Attacks on the test images, each run on its own."""
    certifiers: list[Certifier] = [BoundCertifier()]
    """Certifiers of the test images."""
    examples: PositiveInt | None = None
    """Evaluate so many test images, a stratified sample; all by default."""
    draw: NonNegativeInt = 0
    """Which ones: the number of the draw, which decides every sample of images here; the first n of N images drawn
    are those drawn for n, and all runs on a set see the same."""
    train_examples: NonNegativeInt = 200
    """Attack so many training images as well: how far training and test lie apart."""
    lipschitz_examples: NonNegativeInt = 200
    """Measure the local Lipschitz constant around so many test images, and training images."""
    radii: list[Number] = []
    """Report certified accuracy at these radii, too, from the radius of each example: ``[36/255, 72/255]``."""
    audit: float = Field(default=0.02, ge=0, le=1)
    """Share of the evaluation's passes that are spent on attacking the certified examples nearest to failing, at
    least 8 of each certifier; 0 for none."""
    minutes: PositiveNumber | None = None
    """Certify and attack for so long, where that decides most, and report what was decided; asked again, an
    evaluation goes on for as long. Without end by default. Training images, curve and the local Lipschitz constant
    wait until nothing is left."""
    batch_size: PositiveInt = 256
    """Images per forward pass."""
    keep_adversarial: NonNegativeInt = 1000
    """Keep so many adversarial examples of each attack in the run folder."""
    curve_points: NonNegativeInt = 8
    """Radii of the sandwich curve, evenly spaced up to twice eps; 0 for no curve."""
    curve_examples: PositiveInt = 500
    """The curve rests on so many of the evaluated images."""


class Experiment(Settings):
    """A training, and what is asked of the trained model."""

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
    def test_threat(self) -> Threat:
        """The threat model of the evaluation."""
        return self.evaluation.threat or self.threat

    @property
    def test_data(self) -> Data:
        """The data whose test images are evaluated."""
        return self.evaluation.data or self.data

    def training_recipe(self) -> dict[str, Any]:
        """What the folder of the training keeps of the recipe."""
        kept = sparse(self, without=frozenset({"evaluation"}))
        if self.training.watch is not None:  # what is validated chooses the weights
            asked = sparse(self.evaluation)
            kept["evaluation"] = {key: asked[key] for key in ("certifiers", "draw") if key in asked}
        return kept

    def evaluation_recipe(self) -> dict[str, Any]:
        """What the folder of an evaluation keeps of it."""
        asked = sparse(self.evaluation, without=frozenset({"threat", "data"}))
        tested = sparse(self.test_data)
        return {"threat": self.test_threat.serialise(), "data": tested, "seed": self.seed, "evaluation": asked}

    @property
    def identity(self) -> str:
        """The name of the training: a hash of what decides its weights, and of nothing else."""
        parts = sparse(self, without=frozenset({"evaluation", "engine", "analysis", "data", "training", "seed"}))
        watched = self.training.watch is not None
        left_out = NOT_OF_THE_WEIGHTS | (frozenset() if watched else NOT_WATCHED)
        parts |= {"data": sparse(self.data, without=frozenset({"root"})), "seed": self.seed}
        parts["training"] = sparse(self.training, without=left_out)
        if self.engine.precision != "32-true":
            parts["precision"] = self.engine.precision
        if watched:
            parts["validation"] = sparse(self.evaluation).get("draw", 0)
        if self.training.watch == "certified":
            parts["certifiers"] = plain(self.evaluation.certifiers)
        return digest({"since": TRAINS_ALIKE_SINCE, **parts})

    def evaluation_identity(self, model: str) -> str:
        """The name of an evaluation: a hash of the model, what is asked of it, and the seed.

        Args:
            model: the name of the training, or of a model that was not trained here.
        """
        asked = sparse(self.evaluation, without=NOT_ASKED)
        # Principal components are those of the training images.
        left_out = NOT_TESTED if self.test_data.components is None else frozenset({"root"})
        tested = sparse(self.test_data, without=left_out)
        parts = {"model": model, "threat": self.test_threat.serialise(), "data": tested, "seed": self.seed}
        return digest({"since": ANSWERS_ALIKE_SINCE, **parts, "asked": asked})
