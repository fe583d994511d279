"""Recipes and overrides: what one writes is what one gets, and what is misspelt is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from holdfast import Threat, train
from holdfast.attacks import FGSM, PGD, Ladder
from holdfast.experiments import Experiment, recipe_names, resolve
from holdfast.experiments.recipes.overrides import recipe_note
from holdfast.objectives import IBP, TRADES


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_resolves_reads_back_and_says_what_it_is(name: str) -> None:
    experiment = resolve(name)
    text = yaml.safe_dump(experiment.model_dump(mode="json"))
    assert Experiment.model_validate(yaml.safe_load(text)) == experiment
    assert Experiment.model_validate(yaml.safe_load(text)).identity == experiment.identity
    assert recipe_note(name).endswith(".")


FIELD = ["mnist-cnn7-ibp", "mnist-cnn7-mtl-ibp", "cifar10-cnn7-ibp-8", "cifar10-cnn7-mtl-ibp-8"]
FIELD += ["cifar10-cnn7-mtl-ibp-2", "cifar10-small-mtl-ibp-2", "cifar10-sabr-2", "cifar10-bronet"]
SMALLER = [
    "data=digits",
    "data.train_size=32",
    "training.batch_size=8",
    "training.steps=4",
    "evaluation.examples=3",
    "evaluation.attacks=[fgsm]",
    "evaluation.train_examples=0",
    "evaluation.lipschitz_examples=0",
]


@pytest.mark.parametrize("name", FIELD)
def test_the_recipes_of_the_field_s_best_train_and_are_certified(name: str, tmp_path: Path) -> None:
    """A few steps of each on digits, its network as it is but for the widest."""
    model = "{name: bronet, width: 8, depth: 1, features: 16}" if "bronet" in name else "cnn-small"
    time = [] if "bronet" in name else ["evaluation.certifiers.0.seconds=0.2"]
    recipe = resolve(name, [*SMALLER, *time, "evaluation.curve_points=0", f"model={model}"])
    found = train(recipe, runs=tmp_path)
    assert found.result["examples"] == 3
    assert 0 <= found.result["certified"][recipe.evaluation.certifiers[0].name] <= found.result["standard"]


def test_the_promised_recipes_are_there() -> None:
    assert {"digits", "digits-trades", "mnist-ibp", "mnist-trades"} <= set(recipe_names())


def test_overrides_change_settings_swap_components_and_reach_into_lists() -> None:
    experiment = resolve(
        "digits",
        [
            "objective.kappa=0.3",
            "threat.eps=8/255",
            "optimizer.lr=1e-3",
            "evaluation.attacks.0.budget=quick",
            "data.train_size=100",
        ],
    )
    assert experiment.objective == IBP(kappa=0.3)
    assert experiment.threat == Threat("linf", 8 / 255)
    assert experiment.optimizer.lr == 0.001
    assert experiment.evaluation.attacks == [Ladder(budget="quick")]
    assert experiment.data.train_size == 100
    assert resolve("digits", ["objective=trades"]).objective == TRADES()
    assert resolve("digits", ["objective=trades", "objective.beta=3"]).objective == TRADES(beta=3)
    assert resolve("digits", ["threat=l2:36/255"]).threat == Threat("l2", 36 / 255)
    attacks = "evaluation.attacks=[fgsm, {name: pgd, steps: 7}]"
    assert resolve("digits", [attacks]).evaluation.attacks == [FGSM(), PGD(steps=7)]


def test_identity_is_of_the_meaning_not_the_writing() -> None:
    plain = resolve("digits")
    assert plain.identity == resolve("digits", ["threat=linf:1/10", "objective.kappa=5e-1"]).identity
    assert plain.identity != resolve("digits", ["seed=1"]).identity
    assert len(plain.identity) == 12


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.kapa=1"], r"objective: unknown key 'kapa'; did you mean 'kappa' or 'start_kappa'\?"),
        (["objectiv=trades"], "unknown key 'objectiv'; did you mean 'objective'"),
        (["objective=trade"], "objective: 'trade' is not one of the objectives; did you mean 'trades'"),
        (["threat=linf:-1"], "threat: eps must be ≥ 0"),
        (["threat=linf:abc"], "threat: expected a number or a fraction such as 8/255, given 'abc'"),
        (["threat.eps=[1]"], "threat: expected a number"),
        (["training.epochs=0"], "training.epochs: Input should be greater than 0, given 0"),
        (["training.epochs=many"], "training.epochs: .*given 'many'"),
        (["training.epochs"], "expected key=value, given 'training.epochs'"),
        (["=3"], "expected key=value"),
        (["evaluation.attacks.3.steps=1"], "'3' is not one of the positions 0 to 0"),
        (["seed.x=1"], "nothing inside 0"),
        (["data={"], "not a YAML value"),
        (["evaluation.attacks=[pgd, pgd]"], "listed twice"),
        (["optimizer.lr=-1"], "optimizer.lr: Input should be greater than 0"),
    ],
)
def test_what_is_wrong_is_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve("digits", overrides)


def test_recipes_are_names_or_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'digit' is not a recipe; did you mean 'digits'"):
        resolve("digit")
    with pytest.raises(FileNotFoundError, match="no recipe file"):
        resolve(tmp_path / "missing.yaml")
    path = tmp_path / "mine.yaml"
    path.write_text("data: digits\nmodel: mlp\nthreat: linf:0.1\nobjective: cross-entropy\n")
    assert resolve(path).model.name == "mlp"
    path.write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="expected a mapping, found list"):
        resolve(path)
    path.write_text("data: {digits\n")
    with pytest.raises(ValueError, match="is not YAML"):
        resolve(path)
    path.write_text("data: digits\n")
    with pytest.raises(ValueError, match="model: Field required"):
        resolve(path)
