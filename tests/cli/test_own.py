"""Components of one's own in the current folder, by the command line; and folders of strangers."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers import TINY
from typer.testing import CliRunner, Result

from holdfast.cli import app
from holdfast.objectives import Objective

OWN = """
from torch.nn.functional import cross_entropy
from holdfast.attacks import FGSM
from holdfast.objectives import Loss, Objective

class Warm(Objective, name="warm"):
    '''Cross-entropy at a temperature.'''
    temperature: float = 1.0
    '''Logits are divided by it.'''
    def loss(self, model, x, y, threat, progress):
        return Loss(cross_entropy(model(x) / self.temperature, y), {})

class Mine(FGSM):
    '''As it was.'''

def make(num_classes):
    '''A line.'''
    from torch import nn
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
"""


def holdfast(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(autouse=True)
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    yield tmp_path
    sys.modules.pop("own", None)
    Objective.registry.pop("warm", None)


def test_a_run_of_ones_own_and_what_is_shown_of_it_when_it_is_gone(beside: Path) -> None:
    own = ["objective=own:Warm", "objective.temperature=2", "model=own:make"]
    trained = holdfast("train", "digits", *TINY, *own, "evaluation.attacks=[own:Mine, {name: own:Mine}, fgsm]")
    assert trained.exit_code == 2
    assert "'Mine' is listed twice with the same settings" in trained.stderr
    trained = holdfast("train", "digits", *TINY, *own, "evaluation.attacks=[own:Mine,pgd]")
    assert trained.exit_code == 0, trained.output
    assert "Warm on digits" in trained.stdout
    run = Path(trained.stdout.splitlines()[-1])
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["objective"] == {"name": "own:Warm", "temperature": 2.0}
    assert recipe["model"]["path"] == "own:make"
    (first,) = (run / "evaluations").iterdir()
    assert "imports own from " in trained.stderr

    evaluated = holdfast("evaluate", str(run), "--attacks", "own:Mine", "--certifiers", "", "threat=linf:0.01")
    assert evaluated.exit_code == 0, evaluated.output
    assert "FGSM" in evaluated.stdout

    sys.modules.pop("own")
    Path("own.py").write_text("raise SystemExit('code of a stranger')")
    for command in (["show", str(run)], ["runs"], ["table"], ["plot", "table", "--by", "objective"]):
        shown = holdfast(*command)
        assert shown.exit_code == 0, (command, shown.output)
        assert "Warm" in shown.stdout
    Path("own.py").unlink()
    shown = holdfast("show", str(run))
    assert "own:Warm of the objectives cannot be imported: there is no module 'own'" in shown.stderr
    without = [line for line in trained.stdout.splitlines() if "FGSM" not in line]  # a title of its own
    again = holdfast("show", str(first)).stdout
    assert set(without[:-1]) <= {*again.splitlines()}
    gone = holdfast("evaluate", str(run), "--attacks", "fgsm")
    assert gone.exit_code == 2
    assert "No module named 'own'" in gone.stderr


def test_list_and_show_tell_of_what_is_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = holdfast("show", "own:Warm").stdout
    assert "Cross-entropy at a temperature." in " ".join(shown.split())
    assert "Logits are divided by it." in " ".join(shown.split())
    factory = holdfast("show", "own:make")
    assert factory.exit_code == 2
    assert "a function that may make a model: A line." in factory.stderr
    assert holdfast("show", "own:Nothing").exit_code == 2

    site = Path("site")
    (site / "ownoffer-1.0.dist-info").mkdir(parents=True)
    (site / "ownoffer-1.0.dist-info" / "METADATA").write_text("Name: own-offer\nVersion: 1.0\n")
    entries = "[holdfast.objectives]\nwarmer = ownoffer:Warmer\n"
    (site / "ownoffer-1.0.dist-info" / "entry_points.txt").write_text(entries)
    text = re.sub(r"class Warm\(.*\):", "class Warmer(Objective):", OWN)
    (site / "ownoffer.py").write_text(text)
    monkeypatch.syspath_prepend(str(site.resolve()))
    listed = holdfast("list", "objectives").stdout
    assert "ownoffer:Warmer of the package own-offer" in listed
    assert "ownoffer" not in sys.modules
    assert "Logits are divided by it." in " ".join(holdfast("show", "warmer").stdout.split())
    sys.modules.pop("ownoffer")


def test_a_recipe_is_shown_without_running_what_it_names() -> None:
    Path("own.py").write_text("raise SystemExit('code of a stranger')")
    text = {"data": "digits", "model": "own:make", "threat": "linf:0.1", "objective": "own:Warm"}
    Path("recipe.yaml").write_text(yaml.safe_dump(text))
    shown = holdfast("show", "recipe.yaml")
    assert shown.exit_code == 0, shown.output
    assert yaml.safe_load(shown.stdout)["objective"] == {"name": "own:Warm"}
    assert "own:Warm of the objectives was not imported to look" in shown.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective=own:Mine", "'own:Mine' is not one of the objectives"),
        ("objective=own:Wram", "did you mean 'Warm'"),
        ("objective=nowhere:Warm", "No module named 'nowhere'"),
        ("objective={name: own:Warm, temprature: 2}", "unknown key 'temprature'; did you mean 'temperature'"),
        ("evaluation.attacks=[own:Warm]", "'own:Warm' is not one of the attacks"),
    ],
)
def test_bad_input_is_a_sentence_and_writes_nothing(override: str, message: str) -> None:
    result = holdfast("train", "digits", *TINY, override)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not Path("runs").exists()
