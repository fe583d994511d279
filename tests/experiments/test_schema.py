"""Names outlive the schema: what is stored, what is hashed, and how older forms are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import TINY
from pydantic import BaseModel

from holdfast.experiments import Experiment, recipe_names, resolve
from holdfast.experiments.catalogue import FAMILIES
from holdfast.experiments.recipes.experiment import EvaluationSettings
from holdfast.experiments.recipes.sparse import plain, sparse
from holdfast.experiments.schema import SCHEMA, upgrade
from holdfast.training import Averaging, Training
from holdfast.training.engine import Engine

DEFAULTS = Path(__file__).parents[1] / "stored_runs" / f"defaults-{SCHEMA}.json"
"""Every setting's default; ``python tests/experiments/test_schema.py`` writes it, once for each schema number."""


def defaults() -> dict[str, dict[str, Any]]:
    """By the name of a component or a group of settings its defaults; what has none is ``required``."""
    groups: dict[str, type[BaseModel]] = {
        one.__name__: one for one in (Experiment, EvaluationSettings, Training, Averaging, Engine)
    }
    for family in FAMILIES:
        for name, member in family.registry.items():
            if member.__module__.startswith("holdfast."):
                groups[f"{family.family}/{name}"] = member
    return {
        name: {
            key: "required" if field.is_required() else plain(field.get_default(call_default_factory=True))
            for key, field in group.model_fields.items()
        }
        for name, group in sorted(groups.items())
    }


def test_a_default_that_changes_needs_a_new_schema_number() -> None:
    """A setting that is gone, renamed or has another default means something else in every stored recipe: raise
    ``SCHEMA`` and write an upgrade. New settings and new components are free; a new number stores them."""
    stored, now = json.loads(DEFAULTS.read_text("utf-8")), json.loads(json.dumps(defaults()))
    for name, settings in stored.items():
        assert name in now, f"{name} is gone"
        for key, default in settings.items():
            assert now[name].get(key, "gone") == default, f"{name}: {key}"


@pytest.mark.parametrize("name", recipe_names())
def test_what_is_stored_of_a_recipe_reads_back_as_the_same(name: str) -> None:
    experiment = resolve(name)
    below = experiment.evaluation_recipe()
    stored = {**experiment.training_recipe(), "evaluation": below["evaluation"]}
    again = Experiment.model_validate(json.loads(json.dumps(stored)))
    assert again == experiment
    assert again.identity == experiment.identity
    assert again.evaluation_identity("m") == experiment.evaluation_identity("m")


def test_only_what_differs_from_the_defaults_is_stored() -> None:
    assert sparse(resolve("digits").objective) == {"name": "ibp"}  # its kappa and ramp are the defaults, too
    assert sparse(resolve("digits", ["objective.kappa=0.25"]).objective) == {"name": "ibp", "kappa": 0.25}
    assert resolve("digits").evaluation_recipe()["evaluation"] == {}
    assert "engine" not in resolve("digits").training_recipe()


WEIGHTS = [
    "seed=1",
    "threat=linf:0.2",
    "training.epochs=3",
    "training.batch_size=32",
    "optimizer.lr=1e-2",
    "objective.kappa=0.25",
    "data.train_size=100",
    "model=mlp",
    "engine.precision=bf16-mixed",
    "training.watch=standard",
]
NOT_WEIGHTS = [
    "engine.accelerator=cpu",
    "engine.devices=2",
    "engine.compile=true",
    "training.keep_every=1",
    "training.checkpoint_every=3",
    "training.validate_every=2",
    "training.validation_examples=10",
    "evaluation.examples=30",
    "evaluation.threat=linf:0.2",
    "evaluation.attacks=[fgsm]",
    "analysis=[{name: neural-collapse}]",
]
ANSWERS = [
    "evaluation.examples=30",
    "evaluation.draw=1",
    "evaluation.attacks=[fgsm]",
    "evaluation.certifiers=[]",
    "evaluation.threat=linf:0.2",
    "evaluation.radii=[0.05]",
    "evaluation.data={name: mnist}",
]
NOT_ANSWERS = [
    "evaluation.keep_adversarial=1",
    "evaluation.curve_points=0",
    "evaluation.curve_examples=10",
    "evaluation.batch_size=7",
    "evaluation.threat=linf:0.1",
    "engine.accelerator=cpu",
]


@pytest.mark.parametrize("change", [*WEIGHTS, *NOT_WEIGHTS])
def test_a_training_is_named_by_what_decides_its_weights(change: str) -> None:
    assert (resolve("digits", [change]).identity == resolve("digits").identity) == (change in NOT_WEIGHTS)


@pytest.mark.parametrize("change", [*ANSWERS, *NOT_ANSWERS])
def test_an_evaluation_is_named_by_what_is_asked(change: str) -> None:
    name = resolve("digits").evaluation_identity("m")
    assert (resolve("digits", [change]).evaluation_identity("m") == name) == (change in NOT_ANSWERS)
    assert name != resolve("digits").evaluation_identity("another model")


def test_a_watched_validation_decides_the_weights() -> None:
    def name(*changes: str) -> str:
        return resolve("digits", ["training.watch=certified", *changes]).identity

    assert name() != name("training.validate_every=2")
    assert name() != name("evaluation.certifiers=[{name: bounds, method: crown}]")
    assert name() == name("evaluation.attacks=[fgsm]")
    stored = resolve("digits", ["training.watch=certified", "evaluation.draw=3"]).training_recipe()
    assert Experiment.model_validate(stored).identity == name("evaluation.draw=3")


def test_a_recipe_of_a_later_version_is_refused() -> None:
    with pytest.raises(
        ValueError, match=rf"schema {SCHEMA + 1}, this version of holdfast reads those up to {SCHEMA}"
    ):
        upgrade({"schema": SCHEMA + 1, "data": {}})
    assert upgrade({"schema": SCHEMA, "data": {"name": "digits"}}) == {"data": {"name": "digits"}}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_where_no_attack_was_named_it_was_pgd_until_the_third_form(number: int) -> None:
    named = {"attacks": [{"name": "fgsm"}]}
    assert upgrade({"schema": number, "evaluation": {}})["evaluation"] == {"attacks": [{"name": "pgd"}]}
    assert upgrade({"schema": number, "evaluation": named})["evaluation"] == named
    assert upgrade({"schema": 4, "evaluation": {}})["evaluation"] == {}
    assert [one.name for one in EvaluationSettings().attacks] == ["ladder"]


def test_square_of_the_fourth_form_could_start_warm() -> None:
    asked = {"attacks": [{"name": "square", "warm": True, "steps": 3}, {"name": "ladder"}]}
    attacks = upgrade({"schema": 4, "evaluation": asked})["evaluation"]["attacks"]
    assert attacks == [{"name": "square", "steps": 3}, {"name": "ladder"}]


def test_a_whole_recipe_of_the_first_form_means_what_it_said() -> None:
    whole = resolve("digits", TINY).model_dump(mode="json")
    assert Experiment.model_validate(upgrade(whole)) == resolve("digits", TINY)


def test_the_audit_of_the_second_form_was_another_share() -> None:
    asked = [upgrade({"schema": 2, "evaluation": {"audit": share}})["evaluation"] for share in (0.1, 1, 0)]
    assert [one.get("audit", "default") for one in asked] == ["default", "default", 0]
    assert upgrade({"schema": 3, "evaluation": {"audit": 0.1}})["evaluation"]["audit"] == 0.1


def test_smoothing_of_the_second_form_drew_off_the_grid() -> None:
    parts = [{"name": "smoothing"}, {"name": "plug-in"}, {"name": "smoothing", "grid_bits": 12}, {"name": "bounds"}]
    for number, bits in ((2, [None, None, 12]), (3, [20, 20, 12])):
        recipe = upgrade({"schema": number, "data": {"name": "digits"}, "evaluation": {"certifiers": parts}})
        found = EvaluationSettings.model_validate(recipe["evaluation"]).certifiers
        assert [one.grid_bits for one in found[:3]] == bits
    assert "certifiers" not in upgrade({"schema": 2, "data": {"name": "digits"}, "evaluation": {}})["evaluation"]


if __name__ == "__main__":
    DEFAULTS.write_text(json.dumps(defaults(), indent=1) + "\n", "utf-8")
