"""holdfast runs, plot, sweep and study as a user meets them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from helpers import TINY, write_run
from typer.testing import CliRunner, Result

from holdfast.cli import app
from holdfast.files import claimed

FAST = [*TINY, "evaluation.train_examples=5", "evaluation.lipschitz_examples=5"]


def holdfast(*arguments: str | Path, answer: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=answer)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Eight finished runs: two losses, two sizes, two seeds."""
    folder = tmp_path / "runs"
    for number in range(8):
        objective, size, seed = ("ibp", "cross-entropy")[number // 4], (60, 120)[number // 2 % 2], number % 2
        recipe = {"data": {"name": "digits", "train_size": size}, "objective": {"name": objective, "kappa": 0.5}}
        path = write_run(folder, f"run{number}", 0.5 + number / 100, **recipe, seed=seed)
        (path / "history.jsonl").write_text('{"epoch": 1, "loss": 0.5, "validation_standard": 0.5}\n')
        (path / "figures").mkdir()
        (path / "figures" / "sandwich.csv").write_text(
            "eps,standard,attacked,certified\n0,0.9,0.9,0.9\n0.1,0.9,0.5,0.2\n"
        )
    return folder


def test_a_sweep_shows_its_cost_its_runs_and_ends_with_the_folder(tmp_path: Path) -> None:
    sweep = ("sweep", "digits", "objective=ibp,cross-entropy", *FAST)
    result = holdfast(*sweep, "--workers", "0", "--runs", tmp_path)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == str(tmp_path)
    assert result.stdout.count("finished") == 2
    assert "2 runs, 12 batches: about" in result.stderr  # the cost, before anything runs
    assert result.stderr.count("\n2/2 ") == 1
    again = holdfast(*sweep, "--workers", "0", "--runs", tmp_path)
    assert "2 of them finished before" in again.stderr


def test_a_plan_is_shown_and_nothing_done(tmp_path: Path) -> None:
    result = holdfast(
        "sweep", "digits", "optimizer.lr=loguniform(1e-3,1e-1)", "--trials", "3", "--dry-run", "--runs", tmp_path
    )
    assert result.exit_code == 0
    assert "3 runs, " in result.stdout
    assert not list(tmp_path.iterdir())


def test_failed_runs_are_shown_and_make_the_exit_code(tmp_path: Path) -> None:
    sweep = ("sweep", "digits", "objective=cross-entropy", "optimizer.lr=0.01,1e30", *FAST)
    result = holdfast(*sweep, "--workers", "0", "--runs", tmp_path)
    assert result.exit_code == 1
    assert "1/2" in result.stderr
    assert "failed" in result.stdout
    assert "the loss is" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "digits", "objective=tradez,ibp"], "did you mean 'trades'"),
        (["sweep", "digitz", "seed=0,1"], "did you mean 'digits'"),
        (["sweep", "digits", "seed=0,1", "--on", "mars"], "is not where runs can be launched"),
        (["sweep", "digits", "seed=0,1", "--on", "slurm", "--resource", "gpus"], "--resource KEY=VALUE"),
        (["study", "mnist-bpc"], "did you mean 'mnist-bcp'"),
        (["study", "nowhere.yaml"], "there is no file"),
        (["study", "mnist-bcp", "--data", "cifar10"], "on its own data or on digits"),
        (["study", "mnist-bcp", "--scale", "2"], "a scale above 0"),
        (["study", "mnist-bcp", "objetive=ibp", "--dry-run"], "did you mean 'objective'"),
        (["study", "staircase", "seed=3"], "trains nothing"),
        (["plot", "lines", "--x", "seed"], "there are no finished runs"),
        (["runs", "--where", "objective"], "is no condition"),
    ],
)
def test_bad_input_is_answered_and_writes_nothing(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = holdfast(*arguments, "--runs", tmp_path)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


def test_runs_are_listed_selected_sorted_and_exported(runs: Path, tmp_path: Path) -> None:
    result = holdfast("runs", "--where", "objective=ibp seed=0", "--sort", "-data.train_size", "--runs", runs)
    assert "2 of 8 runs" in result.stdout
    for name in ("all.csv", "all.parquet", "some.tex"):
        more = ["--columns", "objective,standard"] if name.startswith("some") else []
        assert holdfast("runs", *more, "--export", tmp_path / name, "--runs", runs).exit_code == 0
    table = pd.read_csv(tmp_path / "all.csv")
    assert len(table) == len(pd.read_parquet(tmp_path / "all.parquet")) == 8
    assert {"objective.name", "standard", "last.loss", "evaluation.attacks.0.steps"} <= set(table.columns)
    assert (tmp_path / "some.tex").read_text().count(r"\\") == 9
    assert holdfast("runs", "--export", tmp_path / "x.xlsx", "--runs", runs).exit_code == 2
    assert "did you mean 'standard'" in holdfast("runs", "--columns", "standrd", "--runs", runs).stderr


def test_only_confirmed_runs_are_deleted(tmp_path: Path) -> None:
    for number in range(3):
        write_run(tmp_path, f"run{number}")
    refused = holdfast("runs", "--delete", "--runs", tmp_path, answer="n\n")
    assert "nothing was deleted" in refused.output
    assert len(list(tmp_path.iterdir())) == 3
    assert holdfast("runs", "--delete", "--runs", tmp_path, answer="").exit_code == 1  # nobody to ask
    assert len(list(tmp_path.iterdir())) == 3
    assert holdfast("runs", "--where", "standard<0", "--delete", "--runs", tmp_path, answer="y\n").exit_code == 2
    with claimed(tmp_path / "run1"):
        assert "another process works on it" in holdfast("runs", "--delete", "--yes", "--runs", tmp_path).stderr
    assert holdfast("runs", "--delete", "--yes", "--runs", tmp_path).exit_code == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["lines", "--x", "data.train_size", "--y", "standard,certified", "--by", "objective", "--log-x"],
        ["bars", "--x", "data.train_size", "--y", "standard", "--by", "objective"],
        ["scatter", "--x", "gap", "--y", "attacked", "--by", "objective"],
        ["curve", "--where", "seed=0 data.train_size=120"],
        ["lines", "--x", "objective.kappa", "--y", "standard", "--best", "last.validation_standard"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_figures_come_with_their_numbers(arguments: list[str], runs: Path, tmp_path: Path) -> None:
    result = holdfast("plot", *arguments, "--runs", runs, "--output", tmp_path / "drawn" / "figure.png")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == str(tmp_path / "drawn" / "figure.png")
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == [
        f"figure.{s}" for s in ("csv", "pdf", "png", "svg")
    ]


def test_a_table_has_means_over_seeds(runs: Path, tmp_path: Path) -> None:
    where = ("--where", "data.train_size=120")
    result = holdfast("plot", "table", "--by", "objective", *where, "--runs", runs, "--output", tmp_path / "t")
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "t.csv").set_index("objective")
    assert table["seeds"].tolist() == [2, 2]
    assert table.loc["ibp", "standard"] == pytest.approx((0.52 + 0.53) / 2)
    mixed = holdfast("plot", "table", "--by", "objective", "--runs", runs)
    assert mixed.exit_code == 2
    assert "differ in data.train_size" in mixed.stderr


@pytest.mark.parametrize("command", ["runs", "plot", "sweep", "study"])
def test_help_needs_no_torch(command: str) -> None:
    code = "import sys\nfrom holdfast.cli import app\n"
    code += f"try:\n    app([{command!r}, '--help'])\nexcept SystemExit:\n    pass\n"
    code += "assert not {'torch', 'pandas', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
