"""Another curve and more adversarial images of a finished evaluation: made from what is there, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import TINY

from holdfast import train
from holdfast.experiments import Run, evaluate_run
from holdfast.experiments.records.record import read_record
from holdfast.experiments.runs import evaluation, reported
from holdfast.files import claimed
from holdfast.training import Reporter

FEW = (*TINY, "evaluation.train_examples=0", "evaluation.lipschitz_examples=0", "evaluation.keep_adversarial=3")
SMOOTHING = "evaluation.certifiers=[{name: smoothing, mode: fixed, n0: 20, n: 100}]"


class Heard(Reporter):
    def __init__(self) -> None:
        self.text = ""

    def stage(self, text: str) -> None:
        self.text += f"{text}\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train("digits", *FEW, runs=tmp_path_factory.mktemp("runs"))


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Run:
    """A finished training of one's own."""
    return Run(Path(shutil.copytree(trained.path, tmp_path / trained.path.name)))


@pytest.fixture
def nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody trains, and nobody makes a table."""
    for name in ("evaluate", "_evaluate"):
        monkeypatch.setattr(evaluation, name, None)
    monkeypatch.setattr("holdfast.experiments.runs.training.fit", None)


def curve_of(run: Run) -> pd.DataFrame:
    return pd.read_csv(run.evaluated.path / "figures" / "sandwich.csv")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("also", [(), ("threat=l2:0.3", SMOOTHING), ("evaluation.attacks=[fmn]",)])
def test_a_curve_asked_for_afterwards_is_that_of_a_new_evaluation(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, also: tuple[str, ...]
) -> None:
    asked = "evaluation.curve_points=5", "evaluation.curve_examples=40"
    whole = evaluate_run(
        Path(shutil.copytree(run.path, tmp_path / "other" / run.path.name)), *also, *asked, again=True
    )
    first = evaluate_run(run.path, *also)
    before = contents(first.path)
    monkeypatch.setattr(evaluation, "_evaluate", None)
    heard = Heard()
    again = evaluate_run(run.path, *also, *asked, reporter=heard)
    assert "new are evaluation.curve_points=5, evaluation.curve_examples=40" in heard.text
    assert again.path == first.path
    assert len(curve_of(again)) == 7  # 0, five radii, and eps
    assert curve_of(again).equals(curve_of(whole))
    after = contents(again.path)
    changed = {name for name, content in after.items() if before.get(name) != content}
    assert changed >= {f"figures/sandwich.{suffix}" for suffix in ("csv", "png")}
    assert changed <= {f"figures/sandwich.{suffix}" for suffix in ("csv", "png", "pdf", "svg")} | {
        "recipe.yaml",
        "environment.json",
    }
    assert again.experiment.evaluation == whole.experiment.evaluation
    assert read_record(again.path).values["evaluation.curve_examples"] == 40


@pytest.mark.usefixtures("nothing_again")
def test_the_command_that_trained_it_draws_another_curve_too_and_a_default_asks_for_nothing(run: Run) -> None:
    runs = run.path.parent
    assert train("digits", *FEW, "evaluation.curve_points=4", runs=runs).path == run.path
    assert len(curve_of(run)) == 5
    heard = Heard()
    train("digits", *(one for one in FEW if "curve" not in one and "keep" not in one), runs=runs, reporter=heard)
    evaluate_run(run.path, "evaluation.batch_size=7", reporter=heard)
    assert heard.text.count("is finished already\n") == 2
    assert len(curve_of(run)) == 5


@pytest.mark.usefixtures("nothing_again")
def test_adversarial_images_kept_afterwards_are_those_kept_at_once(run: Run) -> None:
    path = run.evaluated.path / "adversarial" / "pgd.npz"
    with np.load(path) as few:
        three = dict(few)
    assert len(three["index"]) == 3
    evaluate_run(run.path, "evaluation.keep_adversarial=6")
    with np.load(path) as file:
        six = dict(file)
    assert len(six["index"]) == len(six["x_adv"]) == len(six["probabilities"]) == 6
    assert all(np.array_equal(six[name][:3], values) for name, values in three.items())
    table = run.examples.set_index("index")
    assert (six["probabilities"].argmax(1) == six["label"]).all()
    assert (six["probabilities_adv"].argmax(1) != six["label"]).all()
    assert np.array_equal(table["pgd.distance"][six["index"]], six["distance"])
    assert Run(run.path).experiment.evaluation.keep_adversarial == 6


def test_adversarial_images_made_again_are_the_same_images(run: Run) -> None:
    evaluate_run(run.path, "evaluation.keep_adversarial=1000")
    with np.load(run.evaluated.path / "adversarial" / "pgd.npz") as file:
        afterwards = file["x_adv"]
    evaluate_run(run.path, "evaluation.keep_adversarial=1000", again=True)
    with np.load(run.evaluated.path / "adversarial" / "pgd.npz") as file:
        assert np.allclose(afterwards, file["x_adv"], atol=1e-6)


@pytest.mark.parametrize(
    ("column", "words"),
    [("pgd.distance", r"evaluation\.keep_adversarial=12 needs --again"), ("label", "other images")],
)
def test_what_cannot_be_made_again_says_so_and_changes_nothing(run: Run, column: str, words: str) -> None:
    path = run.evaluated.path / "examples.parquet"
    table = pd.read_parquet(path)
    table[column] = (table[column] / 2).astype(table[column].dtype)
    table.to_parquet(path)
    before = contents(run.path)
    with pytest.raises(ValueError, match=words):
        evaluate_run(run.path, "evaluation.keep_adversarial=12", "evaluation.curve_points=3")
    assert contents(run.path) == before


@pytest.mark.usefixtures("nothing_again")
def test_less_than_is_there_throws_nothing_away_and_says_so(run: Run) -> None:
    before = contents(run.path)
    heard = Heard()
    evaluate_run(run.path, "evaluation.keep_adversarial=1", "evaluation.curve_points=0", reporter=heard)
    assert "with more than evaluation.keep_adversarial=1 and evaluation.curve_points=0 ask for" in heard.text
    assert contents(run.path) == before


@pytest.mark.usefixtures("nothing_again")
def test_a_report_that_was_cut_off_is_made_by_the_same_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reported, "save_figure", stop)
        with pytest.raises(KeyboardInterrupt):
            evaluate_run(run.path, "evaluation.curve_points=3")
    assert len(curve_of(run)) == 3
    evaluate_run(run.path, "evaluation.curve_points=3")
    assert len(curve_of(run)) == 5


def test_a_report_is_made_under_the_claim(run: Run) -> None:
    with claimed(run.evaluated.path), pytest.raises(BlockingIOError):
        evaluate_run(run.path, "evaluation.curve_points=3")


@pytest.mark.usefixtures("nothing_again")
def test_what_only_a_new_training_could_keep_is_said(run: Run) -> None:
    heard = Heard()
    train("digits", *FEW, "training.keep_every=1", runs=run.path.parent, reporter=heard)
    assert "is trained already, without training.keep_every=1: that needs --again" in heard.text
