"""docs/results.md comes of its list: every table and figure has its commands, which are the command line's."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main
import yaml

from holdfast import Threat
from holdfast.cli import app
from holdfast.cli.evaluate import several
from holdfast.experiments import resolve
from holdfast.experiments.analyses import Analysis
from holdfast.experiments.recipes.experiment import Experiment
from holdfast.experiments.studies.study import plan_study, read_study

DOCS = Path(__file__).parents[2] / "docs"
COMMANDS = typer.main.get_command(app)


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_results", DOCS / "results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


results = load()
LISTED = results.read_list()
PAGE = (DOCS / "results.md").read_text("utf-8")
ENTRIES = [(kind, name) for kind, entries in LISTED.items() for name in entries]


def parsed(command: str) -> tuple[str, dict[str, Any]]:
    """What the command line makes of it."""
    program, name, *arguments = shlex.split(command)
    assert program == "holdfast"
    return name, COMMANDS.commands[name].make_context(name, arguments).params  # type: ignore[attr-defined]


def resolved(commands: Sequence[str]) -> list[Experiment]:
    """The recipes of the trainings and evaluations; what does not fit raises."""
    trained = ("", ())
    found = []
    for command in commands:
        name, given = parsed(command)
        overrides = given["overrides"] or ()
        if name == "train":
            trained = given["recipe"], overrides
            found.append(resolve(*trained))
        elif name == "evaluate":
            assert given["model"] == "{run}"
            found.append(resolve(trained[0], [*trained[1], *overrides]))
            assert all(Threat.parse(one) for one in several(given["threat"]))
        elif name == "study":
            study = read_study(given["name"])
            assert plan_study(study, scale=given["scale"], overrides=overrides)[0] or study.staircase
        else:
            own = dict(one.split("=", 1) for one in overrides if not one.startswith("threat="))
            Analysis.parse({"name": given["analysis"], **{key: yaml.safe_load(own[key]) for key in own}})
    return found


def test_every_table_and_figure_of_the_page_is_listed_and_vice_versa() -> None:
    assert re.findall(r"<!-- table ([\w-]+) -->", PAGE) == list(LISTED["tables"])
    assert PAGE.count("<!-- end -->") == len(LISTED["tables"])
    assert set(re.findall(r"\(figures/([\w-]+)\.png\)", PAGE)) == set(LISTED["figures"])
    outside = re.sub(r"<!-- table .*?<!-- end -->", "", PAGE, flags=re.DOTALL)
    assert not [line for line in outside.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("name", LISTED["tables"])
def test_a_table_has_the_columns_and_at_least_the_rows_of_the_list(name: str) -> None:
    block = PAGE.partition(f"<!-- table {name} -->\n")[2].partition("<!-- end -->")[0].splitlines()
    entry = LISTED["tables"][name]
    assert block[0] == "| " + " | ".join(entry["columns"]) + " |"
    assert len(block) - 2 >= len(entry["rows"])
    for line in block:
        assert line.count(" |") == len(entry["columns"]), line


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_every_command_is_one_of_the_command_line(kind: str, name: str) -> None:
    commands = results.commands_of(LISTED[kind][name])
    assert commands
    for command in commands:
        assert set(re.findall(r"\{(\w+)\}", command)) <= {"run", "run1", "run2", "run3"}
    resolved(commands)


@pytest.mark.parametrize(
    "command", ["holdfast train digits objective=tradse", "holdfast analyze digits separatoin"]
)
def test_a_misspelt_command_would_be_found(command: str) -> None:
    with pytest.raises(ValueError, match="did you mean"):
        resolved([command])


def test_the_rows_of_a_table_are_different_trainings() -> None:
    """But for those that say at which threat, or of which part, the same one is looked at."""
    for name, entry in LISTED["tables"].items():
        found = resolved([one for one in results.commands_of(entry) if one.startswith("holdfast train")])
        names = [one.evaluation_identity(one.identity) for one in found]
        assert len(set(names)) == len(names), name


SMALL = """
tables:
  small:
    seeds: [0, 1]
    commands:
      - &train >-
        holdfast train digits "objective={name: {objective}}" "model={name: mlp, hidden: [8]}" seed={seed}
        training.epochs=1 training.validation_examples=20 evaluation.examples=40 evaluation.train_examples=0
        evaluation.lipschitz_examples=0 evaluation.curve_points=0 "evaluation.attacks=[{name: pgd, steps: 1}]"
    columns: {loss: "`{objective}`", standard: "{standard|.1%}", PGD: "{attacked.pgd|.2p}", eps: "{threat.eps}"}
    rows: [{objective: cross-entropy}]
  absent:
    commands: [holdfast train digits --rusn nowhere]
    columns: {standard: "{standard}"}
    rows: [{}]
  elsewhere:
    commands: [*train, "holdfast evaluate {run} --threat {asked} evaluation.examples=20"]
    columns: {threat: "{threat}", standard: "{standard|.4f}"}
    rows: [{objective: cross-entropy, asked: "linf:0.05"}]
figures: {}
"""
BEFORE = """# Numbers

<!-- table absent -->
| standard |
| --- |
| 12 |
<!-- end -->

In between.

<!-- table small -->
old
<!-- end -->
<!-- table elsewhere -->
older
<!-- end -->
After.
"""


@pytest.mark.slow
def test_a_table_is_what_the_runs_say_and_what_fails_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOLDFAST_RUNS", raising=False)
    page = tmp_path / "page.md"
    page.write_text(BEFORE)
    listed = yaml.safe_load(SMALL)
    (left,) = results.remake(listed, page, tmp_path)
    assert left.startswith("table absent is left as it is: exit code 2 of holdfast train digits --rusn nowhere")
    all_found = [json.loads(path.read_text()) for path in tmp_path.glob("runs/*/evaluations/*/result.json")]
    found = [result for result in all_found if result["threat"] == "linf:0.1"]
    assert (len(found), len(all_found)) == (2, 3)
    standard = sum(result["standard"] for result in found) / 2
    attacked = sum(result["attacked"]["pgd"] for result in found) / 2
    row = f"| `cross-entropy` | {100 * standard:.1f} % | {100 * attacked:.2f} | 0.1 |"
    table = f"| loss | standard | PGD | eps |\n| --- | --- | --- | --- |\n{row}"
    (other,) = (result for result in all_found if result["threat"] == "linf:0.05")
    below = f"| threat | standard |\n| --- | --- |\n| linf:0.05 | {other['standard']:.4f} |"
    assert page.read_text() == BEFORE.replace("older", below).replace("old\n", f"{table}\n")


def test_of_a_study_and_an_analysis_the_lines_that_a_row_chooses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "table.csv").write_text(
        "points,method,seeds,train MSE\n40,natural,1,0.0043\n40,llr,1,–\n3,llr,1,1\n"
    )
    monkeypatch.setattr(results, "run", lambda command: tmp_path)
    entry = {
        "commands": ["holdfast study staircase"],
        "columns": {"": "{points} {label}", "MSE": "{train MSE}", "%": "{train MSE|.1f %}"},
        "rows": [{"where": {"method": "llr", "label": 1}, "label": "LLR"}],
    }
    assert results.make_table(entry)[2:] == ["| 40 LLR | – | – |", "| 3 LLR | 1.0 | 1.0 % |"]
    (tmp_path / "table.csv").write_text("part,distance,right\ntrain,0.5,True\ntest,0.25,True\ntest,0.75,False\n")
    values = results.measured(tmp_path, {"where": {"part": "test"}})
    names = (
        "table.distance.sum",
        "table.distance.min",
        "table.distance.mean",
        "table.right.sum",
        "table.right.mean",
    )
    assert [values[name] for name in names] == [1, 0.25, 0.5, 1, 0.5]


def test_a_figure_is_what_its_last_command_drew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def run(command: str) -> Path:
        done.append(command)
        folder = tmp_path / f"run{len(done)}"
        folder.mkdir()
        (folder / "curves.png").write_bytes(b"picture %d" % len(done))
        return folder

    monkeypatch.setattr(results, "run", run)
    entry = {
        "objective": "{name: trades, steps: 5}",
        "commands": ['train "{objective}" seed=0', "train seed=1", "analyze {run} --with {run1}"],
        "file": "curves.png",
    }
    assert results.remake({"tables": {}, "figures": {"trades": entry}}, tmp_path / "page.md", tmp_path) == []
    assert done[0] == 'train "{name: trades, steps: 5}" seed=0'
    assert done[2] == f"analyze {tmp_path}/run2 --with {tmp_path}/run1"
    assert (tmp_path / "trades.png").read_bytes() == b"picture 3"


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (0.9751, ".1%", "97.5 %"),
        (0.9751, ".2p", "97.51"),
        (97.5, ".1f %", "97.5 %"),
        (0.5, ".1f°", "28.6°"),
        (None, ".1f %", "–"),
        (float("nan"), ".1%", "–"),
        (16000, "", "16000"),
        (0.1, ".4g", "0.1"),
    ],
)
def test_how_a_number_is_written(value: float | None, form: str, text: str) -> None:
    assert results.write(value, form) == text


def test_a_name_that_no_run_has_leaves_the_table() -> None:
    with pytest.raises(ValueError, match=r"there is no 'standrd'; did you mean 'standard'"):
        results.cell("{standrd}", {}, {"standard": 1.0})


def test_the_list_is_shown_by_the_beginning_of_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert results.main(["digits-nearest", "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "# digits-nearest-neighbour",
        "holdfast analyze digits nearest-neighbour threat=linf:0.1",
        "holdfast analyze digits nearest-neighbour part=train threat=l2:0.5",
    ]
    with pytest.raises(SystemExit):
        results.main(["digist"])
    assert "did you mean 'digits-" in capsys.readouterr().err
