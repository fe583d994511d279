"""The table of defences: one row for each recipe, means and intervals over seeds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import TINY
from typer.testing import CliRunner

from holdfast.cli import app
from holdfast.experiments import Run, resolve
from holdfast.experiments.records.defences import COLUMNS, cells, defence_table, latex
from holdfast.files import write_text


def finished(folder: Path, standard: float, train: float | None, *overrides: str) -> Run:
    """A run that says it is finished, with these accuracies, and half as much under attack."""
    experiment = resolve("digits", overrides)
    run = Run(folder / experiment.identity)
    result = {
        "standard": standard,
        "bracket": {"attacked": standard / 2, "certified": None},
        "counts": {},
        "local_lipschitz": {"mean": 12.5},
    }
    if train is not None:
        result["train"] = {"standard": train, "bracket": {"attacked": 0.75}}
    write_text(run.path / "experiment.yaml", json.dumps(experiment.model_dump(mode="json")))
    write_text(run.path / "result.json", json.dumps(result))
    return run


def test_seeds_make_one_row_with_an_interval(tmp_path: Path) -> None:
    runs = [
        finished(tmp_path, 0.90, 1.0, "objective={name: trades, beta: 1}", "seed=0"),
        finished(tmp_path, 0.94, 1.0, "objective={name: trades, beta: 1}", "seed=1"),
        finished(tmp_path, 0.80, 0.9, "objective={name: trades, beta: 6}"),
        finished(tmp_path, 0.70, None, "objective=cross-entropy", "model={name: mlp}"),
    ]
    table = defence_table(runs).set_index("defence")
    assert list(table.index) == ["trades(beta=1.0)", "trades(beta=6.0)", "cross-entropy"]
    one = table.loc["trades(beta=1.0)"]
    assert one["seeds"] == 2
    assert one["test"] == pytest.approx(92)
    assert one["test_half"] == pytest.approx(12.706 * np.std([90, 94], ddof=1) / np.sqrt(2), rel=1e-3)
    assert one["gap"] == pytest.approx(8)
    assert one["adversarial"] == pytest.approx(46)
    assert one["adversarial_gap"] == pytest.approx(75 - 46)
    assert table.loc["trades(beta=6.0)", "test_half"] != table.loc["trades(beta=6.0)", "test_half"]
    assert np.isnan(table.loc["cross-entropy", "gap"])
    headings, rows = cells(defence_table(runs))
    assert headings[:3] == ["model", "defence", "seeds"]
    assert rows[0][3:5] == ["100.00 ± 0.00", "92.00 ± 25.41 (n=2)"]  # an interval that no accuracy can have
    assert rows[2][-1] == "–"
    text = latex(defence_table(runs))
    assert text.count(r"\\") == 4
    assert r"92.00 $\pm$ 25.41" in text
    assert "lllrrrrrr" not in text
    assert r"\begin{tabular}{llrrrrrrr}" in text


def test_a_mean_over_fewer_seeds_than_the_row_says_over_how_many(tmp_path: Path) -> None:
    recipes = [("objective=trades", f"seed={seed}") for seed in range(3)]
    runs = [finished(tmp_path, 0.90, 1.0 - 0.01 * i if i else None, *recipe) for i, recipe in enumerate(recipes)]
    row = defence_table(runs).iloc[0]
    assert (row["seeds"], row["train_n"], row["test_n"]) == (3, 2, 3)
    assert row["train"] == pytest.approx(98.5)
    assert row["train_half"] == pytest.approx(12.706 * 0.5, rel=1e-3)
    headings, (cell,) = cells(defence_table(runs))
    assert cell[headings.index("train acc.")] == "98.50 ± 6.35 (n=2)"
    assert cell[headings.index("test acc.")] == "90.00 ± 0.00"


def test_a_run_counts_once_and_words_are_escaped(tmp_path: Path) -> None:
    one = finished(tmp_path, 0.9, 1.0, "objective={name: awp, objective: {name: trades, beta: 1}}")
    two = finished(tmp_path, 0.8, 1.0, "objective={name: awp, objective: {name: trades, beta: 3}}")
    again = finished(tmp_path / "elsewhere", 0.7, 1.0, "objective={name: awp, objective: {name: trades, beta: 3}}")
    table = defence_table([one, one, two, again])
    assert table["seeds"].tolist() == [1, 1]
    assert table["test"].tolist() == [90, 70]
    text = latex(table)
    assert "{'" not in text
    assert r"step\_size=" in text


def test_a_damaged_run_does_not_hide_the_others(tmp_path: Path) -> None:
    finished(tmp_path, 0.9, 1.0, "objective=trades")
    broken = finished(tmp_path, 0.9, 1.0, "objective=rst")
    (broken.path / "result.json").write_text("{")
    shown = CliRunner().invoke(app, ["table", "--runs", str(tmp_path)])
    assert shown.exit_code == 0
    assert "left out" in shown.output
    assert "90.00" in shown.stdout


def test_what_several_processes_changed_stands_beside_the_numbers(tmp_path: Path) -> None:
    one, two = (finished(tmp_path, 0.9, 1.0, f"objective={name}") for name in ("trades", "rst"))
    assert "note" not in cells(defence_table([one, two]))[0]
    line = {"stretch": 1, "step": 0, "processes": 4, "by_process": ["BatchNorm"]}
    (two.path / "history.jsonl").write_text(json.dumps(line) + "\n")
    headings, rows = cells(defence_table([one, two]))
    notes = [row[headings.index("note")] for row in rows]
    assert notes == ["", "trained by 4 processes: BatchNorm by process"]
    assert headings[-6:] == [*COLUMNS.values()]  # the numbers stay where they are
    assert latex(defence_table([one, two])).count("4 processes") == 1


def test_recipes_that_differ_elsewhere_are_told_apart(tmp_path: Path) -> None:
    runs = [
        finished(tmp_path, 0.9, 1.0, "objective=cross-entropy", f"training.epochs={epochs}") for epochs in (3, 4)
    ]
    headings, rows = cells(defence_table(runs))
    assert headings[:2] == ["defence", "run"]
    assert {row[1] for row in rows} == {run.path.name for run in runs}


def test_as_a_user_prints_it(tmp_path: Path) -> None:
    overrides = (*TINY, "evaluation.train_examples=50", "evaluation.lipschitz_examples=20")
    for seed in (0, 1):
        arguments = ["train", "digits", *overrides, f"seed={seed}", "objective=rst", "--runs", str(tmp_path)]
        assert CliRunner().invoke(app, arguments).exit_code == 0
    run = Run(next(path.parent for path in tmp_path.glob("*/recipe.yaml")))
    train, table = run.result["train"], run.examples
    assert train["examples"] == 50
    assert train["local_lipschitz"]["examples"] == run.result["local_lipschitz"]["examples"] == 20
    assert table["local_lipschitz"].notna().sum() == 20
    assert run.result["local_lipschitz"]["mean"] == pytest.approx(table["local_lipschitz"].mean())
    assert train["attacked"]["pgd"] <= train["standard"]
    printed = CliRunner().invoke(app, ["table", "--runs", str(tmp_path), "--format", "csv"])
    assert printed.exit_code == 0, printed.output
    (tmp_path / "table.csv").write_text(printed.stdout)
    (row,) = pd.read_csv(tmp_path / "table.csv").to_dict("records")
    assert row["seeds"] == 2
    assert row["defence"] == "rst"
    text = CliRunner().invoke(app, ["table", run.path.name, "--runs", str(tmp_path)])
    assert f"{100 * run.result['standard']:.2f}" in text.stdout
    empty = CliRunner().invoke(app, ["table", "--runs", str(tmp_path / "none")])
    assert empty.exit_code == 2
    assert "no finished trainings" in empty.output
    assert CliRunner().invoke(app, ["table", "--runs", str(tmp_path), "--format", "latx"]).exit_code == 2
