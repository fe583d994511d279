"""Folders that earlier versions wrote are read: ``tests/stored_runs/VERSION`` holds real ones, without pictures."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

from holdfast.data import load_data
from holdfast.evaluation import certified_at
from holdfast.experiments import Run
from holdfast.experiments.records.defences import defence_table
from holdfast.experiments.records.record import read_record, read_records
from holdfast.experiments.runs.folder import all_runs, find_run
from holdfast.experiments.schema import ANSWERS_ALIKE_SINCE, TRAINS_ALIKE_SINCE

STORED = Path(__file__).parents[2] / "stored_runs" / "0.1"


def test_stored_runs_are_listed_with_what_they_reached() -> None:
    for latest in STORED.glob("*/evaluations/*/result.json"):  # a checkout has no order of time
        latest.touch()
    records = {one.name: one for one in read_records(STORED)}
    status = {name: one.status for name, one in records.items()}
    assert sorted(status.values()) == ["cut off", *["finished"] * 5]
    assert len(read_records(STORED, "evaluations")) == 7
    own = read_record(STORED / "d8cbca02d61f", "evaluations").values
    assert (own["standard"], own["certified"], own["threat"]) == (353 / 360, 286 / 360, "linf:0.1")
    digits = records["d8cbca02d61f"].values
    assert (digits["threat"], digits["trained.threat"], digits["schema"]) == ("linf:0.05", "linf:0.1", 1)
    assert digits["objective.kappa"] == 0.5
    assert len(defence_table(read_records(STORED))) == 4


@pytest.mark.parametrize("name", ["d8cbca02d61f", "13d489a1173f", "4a91bea458ac", "31f9c238f587"])
def test_a_stored_model_still_answers_as_its_table_says(name: str) -> None:
    run = find_run(name, STORED)
    x, _ = load_data("digits").test.batch(slice(len(run.examples)))
    model = run.model()
    if "smoothing.radius" in run.examples:
        assert run.experiment.evaluation.certifiers[0].name == "smoothing"
        return
    with torch.no_grad():
        assert model(x).argmax(1).tolist() == run.examples["prediction"].tolist()
    threat = run.experiment.test_threat
    radii = certified_at(run.examples, threat, [0.0, threat.eps])
    assert list(radii["bounds"].values())[:2] == [run.result["standard"], run.result["certified"]["bounds"]]


def test_a_stored_evaluation_below_a_training_is_read(tmp_path: Path) -> None:
    shutil.copytree(STORED / "d8cbca02d61f", tmp_path / "d8cbca02d61f")
    (below,) = (tmp_path / "d8cbca02d61f" / "evaluations").iterdir()
    run = Run(below)
    assert run.finished
    assert str(run.experiment.test_threat) == "linf:0.05"
    assert str(run.experiment.threat) == "linf:0.1"
    assert isinstance(run.examples, pd.DataFrame)
    assert run.result["attacked"]["fmn"] <= run.result["standard"]


def test_a_run_of_the_second_form_is_what_it_was() -> None:
    """What it and its evaluation say; trained now, by other draws, it has another name."""
    (run,) = all_runs(STORED.parent / "2")
    assert run.schema == 2
    assert run.trained_as != run.path.name
    record = read_record(run.path)
    assert (record.status, record.values["objective"], record.values["optimizer.lr"]) == ("finished", "ibp", 0.005)
    assert (record.values["standard"], record.values["evaluations"]) == (353 / 360, 1)
    x, _ = load_data("digits").test.batch(torch.from_numpy(run.examples["index"].to_numpy()))
    with torch.no_grad():
        assert run.model()(x).argmax(1).tolist() == run.examples["prediction"].tolist()


def test_what_the_second_form_answered_is_not_answered_alike() -> None:
    """Certificates account for their rounding since the third: its evaluation is kept, under another name."""
    (run,) = all_runs(STORED.parent / "2")
    (below,) = run.evaluations
    assert below.finished
    assert below.path.name != run.experiment.evaluation_identity(run.path.name)


def test_a_run_of_the_third_form_is_what_it_was() -> None:
    """Draws have changed since: its folders are kept, under names that nothing has now."""
    (run,) = all_runs(STORED.parent / "3")
    assert run.schema == 3
    assert run.trained_as != run.path.name
    (below,) = run.evaluations
    assert below.path.name != run.experiment.evaluation_identity(run.path.name)
    assert [one.grid_bits for one in run.experiment.evaluation.certifiers] == [20, 20]
    assert run.result["sampling"]["smoothing"]["grid_bits"] == 20
    assert (run.result["standard"], run.result["certified"]["smoothing"]) == (32 / 40, 29 / 40)


@pytest.mark.parametrize("schema", [4, 5])
def test_a_run_of_a_later_form_is_what_it_was(schema: int) -> None:
    """Under a name that nothing has now, unless weights and answers are still alike."""
    (run,) = all_runs(STORED.parent / str(schema))
    assert run.schema == schema
    assert (run.trained_as == run.path.name) == (schema >= TRAINS_ALIKE_SINCE)
    (below,) = run.evaluations
    named = run.experiment.evaluation_identity(run.path.name)
    assert (below.path.name == named) == (schema >= ANSWERS_ALIKE_SINCE)
    assert [one.name for one in run.experiment.evaluation.attacks] == ["ladder"]
    result = run.result
    assert result["certified"]["bounds"] <= result["attacked"]["ladder"] <= result["standard"]
    x, _ = load_data("digits").test.batch(torch.from_numpy(run.examples["index"].to_numpy()))
    with torch.no_grad():
        assert run.model()(x).argmax(1).tolist() == run.examples["prediction"].tolist()
