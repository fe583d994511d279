"""The table of all runs: read without torch, selected by any name, old result files among them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import write_run

from holdfast.experiments import Run
from holdfast.experiments.records import selection
from holdfast.experiments.records.record import Record, flatten, read_records
from holdfast.experiments.records.selection import select

REFERENCE = Path(__file__).parents[2] / "reference"


def test_a_run_is_a_row_of_dotted_names(tmp_path: Path) -> None:
    path = write_run(tmp_path, "a", 0.9)
    lines = [
        {"epoch": 1, "loss": 2.0, "neural_collapse": [[1]]},
        {"epoch": 2, "loss": 1.5, "neural_collapse": [[2]]},
    ]
    (path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (record,) = read_records(tmp_path)
    assert record.status == "finished"
    expected = {
        "objective": "trades",
        "objective.beta": 6.0,
        "evaluation.attacks.0.steps": 5,
        "attacked": 0.45,
        "attacked.pgd": 0.45,
        "certified": None,
        "threat": "linf:0.03137",
        "last.loss": 1.5,
    }
    assert {key: record.values[key] for key in expected} == expected
    assert record.values["gap"] == pytest.approx(0.1)
    assert record.values["attacked_gap"] == pytest.approx(0.35)
    assert "last.neural_collapse" not in record.values
    assert "seed" not in record.recipe


def test_what_is_damaged_or_put_aside_hides_nothing(tmp_path: Path) -> None:
    write_run(tmp_path, "good")
    write_run(tmp_path, "begun", None)
    (write_run(tmp_path, "rubbish") / "result.json").write_text("{")
    (write_run(tmp_path, "half") / "result.json").write_text('{"standard": 1, "bracket": {}, "counts": {}}')
    (tmp_path / "good" / "history.jsonl").write_text("[1, 2]")
    (write_run(tmp_path, "empty", None) / "experiment.yaml").write_text("")
    write_run(tmp_path / ".damaged", "aside")
    assert {one.name: one.status for one in read_records(tmp_path)} == {
        "good": "finished",
        "begun": "cut off",
        "rubbish": "damaged",
        "half": "damaged",
        "empty": "damaged",
    }
    assert read_records(tmp_path / "nowhere") == []


def test_old_result_files_are_read_beside_ours(tmp_path: Path) -> None:
    write_run(tmp_path, "ours")
    old = tmp_path / "2024" / "11"
    old.mkdir(parents=True)
    for path in (REFERENCE / "results").iterdir():
        (old / path.name).write_bytes(path.read_bytes())
    (old / "other.yaml").write_text("a: 1")
    found = {one.name: one for one in read_records(tmp_path)}
    assert {name for name, one in found.items() if one.status == "old"} == {
        "AOL-LCN_I",
        "CPL-LCN_II",
        "smoothing_III",
    }
    cpl = found["CPL-LCN_II"].values
    assert (cpl["data"], cpl["data.train_size"], cpl["model"], cpl["optimizer.lr"]) == (
        "cifar10",
        20,
        "CPL-LCN",
        1.0,
    )
    assert cpl["validation_standard"] == cpl["results.eval.Accuracy()"] == pytest.approx(1 / 6)
    assert "standard" not in cpl  # of held-out training images
    assert cpl["arguments.updates.model.base_width"] == 4  # behind a YAML anchor
    smoothing = found["smoothing_III"].values
    assert smoothing["data.train_size"] == 45_000  # asked for 50,000, of which 5,000 were held out
    assert smoothing["results.eval.CRA(0.14)"] == pytest.approx(1 / 12)
    assert "certified" not in smoothing  # an estimate is no certificate


def test_mappings_are_flattened_as_the_original_does() -> None:
    for given, expected in json.loads((REFERENCE / "intriguing_result_selection.json").read_text())["flatten"]:
        assert flatten(given) == expected


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ("objective=trades", ["a", "b"]),
        ("objective.name!=trades", ["c"]),
        ("objective=trades,llr", ["a", "b", "c"]),
        ("data.train_size>=1000", ["b"]),
        ("data.train_size<=100 standard>0.5", ["a"]),
        ("threat.eps=8/255", ["a", "b"]),
        ("threat.eps<1/10 data.train_size!=100", ["b"]),
        ("certified=none", ["a", "b", "c"]),
        ("standard>0.99", []),
    ],
)
def test_conditions_select(where: str, names: list[str], tmp_path: Path) -> None:
    write_run(tmp_path, "a", 0.9)
    write_run(tmp_path, "b", 0.8, data={"name": "mnist", "train_size": 1000})
    write_run(tmp_path, "c", 0.4, objective={"name": "llr"}, threat={"norm": "l2", "eps": 0.5})
    records = read_records(tmp_path)
    assert sorted(one.name for one in select(records, where)) == names


def test_unknown_names_and_broken_conditions_are_told(tmp_path: Path) -> None:
    write_run(tmp_path, "a")
    records = read_records(tmp_path)
    with pytest.raises(ValueError, match=r"no run has 'objektive'; did you mean 'objective'"):
        select(records, "objektive=trades")
    with pytest.raises(ValueError, match="is no condition"):
        select(records, "objective")
    with pytest.raises(ValueError, match="is no condition"):
        select(records, "=trades")
    with pytest.raises(ValueError, match="expected a number"):
        select(records, "standard>high")
    with pytest.raises(ValueError, match="no run has 'standrd'"):
        selection.order(records, "-standrd")


def test_names_and_values_may_hold_commas_and_operators() -> None:
    values = (
        {"c": "0:16,512:3072", "certified.bounds(method=bcp)": 0.5},
        {"c": "0:16", "certified.bounds(method=bcp)": 0.3},
    )
    records = [Record(Path(name), "finished", one) for name, one in zip("ab", values, strict=True)]
    for where, names in (("c=0:16,512:3072", "ab"), ("c!=0:16", "a"), ("certified.bounds(method=bcp)>0.4", "a")):
        assert [one.name for one in select(records, where)] == list(names)


def test_sorting_puts_what_is_missing_last() -> None:
    records = [Record(Path(name), "finished", {"x": value}) for name, value in (("a", 2), ("b", None), ("c", 10))]
    assert [one.name for one in selection.order(records, "x")] == ["a", "c", "b"]
    assert [one.name for one in selection.order(records, "-x")] == ["c", "a", "b"]


@pytest.mark.parametrize(
    ("stretches", "processes", "note"),
    [
        ([(1, [])], "1", ""),
        ([(2, [])], "2", ""),  # nothing but rounding
        ([(1, ["BatchNorm"]), (1, ["BatchNorm"])], "1", ""),
        ([(2, ["BatchNorm", "Dropout"])], "2", "trained by 2 processes: BatchNorm, Dropout by process"),
        (
            [(2, ["Dropout"]), (2, ["Dropout"]), (1, ["Dropout"])],
            "2 then 1",
            "2 then 1 processes: Dropout by process",
        ),
    ],
)
def test_how_many_processes_trained_is_known_and_what_it_changed_is_said(
    tmp_path: Path, stretches: list[tuple[int, list[str]]], processes: str, note: str
) -> None:
    path, lines = write_run(tmp_path, "run"), []
    for number, (count, divided) in enumerate(stretches, start=1):
        lines.append({"stretch": number, "step": 3 * number - 3, "processes": count, "by_process": divided})
        lines.append({"epoch": number, "step": 3 * number, "loss": 1.5, "clean": [1, 2]})
    (path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = read_records(tmp_path)[0].values
    assert values["processes"] == processes
    assert note in values.get("note", "")
    assert ("note" in values) == bool(note)
    assert {key: value for key, value in values.items() if key.startswith("last.")} == {
        "last.epoch": len(stretches),
        "last.step": 3 * len(stretches),
        "last.loss": 1.5,
    }
    assert Run(path).history["epoch"].tolist() == [*range(1, len(stretches) + 1)]
    assert len(Run(path).stretches) == len(stretches)


def test_five_hundred_runs_are_listed_without_torch_or_pandas(tmp_path: Path) -> None:
    first = write_run(tmp_path, "run-000")
    for number in range(1, 500):
        path = tmp_path / f"run-{number:03}"
        path.mkdir()
        for name in ("experiment.yaml", "result.json"):
            (path / name).write_bytes((first / name).read_bytes())
    code = f"""
import sys
from holdfast.cli import app
try:
    app(["runs", "--where", "objective=trades standard>=0.9", "--sort", "-standard", "--runs", {str(tmp_path)!r}])
except SystemExit as done:
    assert not done.code
assert not {{"torch", "pandas", "numpy", "matplotlib"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "500 runs" in done.stdout
    assert done.stdout.count("linf:0.03137") == 500
