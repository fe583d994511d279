"""Models that nobody trained here: known by their weights and by what they answer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import linear_model
from torch import Tensor, nn

from holdfast.data import load_data
from holdfast.experiments import Run, evaluate_model, evaluate_run, load
from holdfast.experiments.records.record import read_record
from holdfast.experiments.runs import untrained
from holdfast.experiments.runs.folder import all_evaluations, all_runs

ASKED = ("evaluation.examples=40", "evaluation.attacks=[fgsm]", "evaluation.certifiers=[]")
QUICK = ("evaluation.curve_points=0", "evaluation.train_examples=0", "evaluation.lipschitz_examples=0")


class Turned(nn.Module):
    """Code that can be edited while the weights stay: what it makes of the image before the network."""

    way = staticmethod(lambda x: x)

    def __init__(self) -> None:
        super().__init__()
        self.network = linear_model(10, (1, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(Turned.way(x))
        return logits


def net(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return Turned()


def evaluated(runs: Path, *overrides: str, again: bool = False) -> Run:
    recipe = {"data": {"name": "digits"}, "model": f"{__name__}:net", "threat": "linf:0.05"}
    return evaluate_model(recipe, *ASKED, *QUICK, *overrides, runs=runs, again=again)


def test_edited_code_with_the_same_weights_is_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluated(tmp_path)
    assert first.path.parent.parent.parent == tmp_path
    known = json.loads((first.training.path / "model.json").read_text())
    assert known["input_shape"] == [1, 8, 8]
    with np.load(first.training.path / "probes.npz") as probes:
        assert len(probes["images"]) == len(probes["logits"]) == untrained.PROBES
    result = first.path / "result.json"
    before = result.stat().st_mtime_ns
    assert evaluated(tmp_path) == first  # by another process as well: nothing but the folder remembers
    assert result.stat().st_mtime_ns == before
    assert evaluated(tmp_path, "evaluation.keep_adversarial=1") == first

    monkeypatch.setattr(Turned, "way", staticmethod(lambda x: x + 1e-7 * torch.rand_like(x)))
    assert evaluated(tmp_path) == first  # devices differ in the last bits
    monkeypatch.setattr(Turned, "way", staticmethod(lambda x: 1 - x))
    edited = evaluated(tmp_path)
    assert edited.training.path.name == f"{first.training.path.name}-2"
    assert edited.result["counts"] != first.result["counts"]
    with pytest.raises(ValueError, match="has changed"):
        load(first.training.path)
    assert isinstance(load(edited.path), Turned)
    assert evaluated(tmp_path) == edited
    assert len(all_runs(tmp_path)) == len(all_evaluations(tmp_path)) == 2


def test_an_untrained_model_is_evaluated_further_by_its_folder(tmp_path: Path) -> None:
    first = evaluated(tmp_path)
    further = evaluate_run(first.training.path, "threat=linf:0.01", runs=tmp_path)
    assert further.path.parent == first.path.parent
    assert further.result["attacked"]["fgsm"] >= first.result["attacked"]["fgsm"]
    assert str(further.experiment.test_threat) == "linf:0.01"
    again = evaluated(tmp_path, again=True)
    assert again.result["counts"] == first.result["counts"]


def test_a_model_that_answers_at_random_is_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Turned, "way", staticmethod(lambda x: x + torch.rand_like(x)))
    assert evaluated(tmp_path).training == evaluated(tmp_path).training


def folder_of_images(path: Path, side: int) -> str:
    from PIL import Image

    test = load_data("digits").test
    for part in ("train", "val"):
        for label in range(10):
            (path / part / str(label)).mkdir(parents=True)
    images, labels = test.batch(slice(60))
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        pixels = (255 * image[0]).byte().numpy()
        for part in ("train", "val"):
            Image.fromarray(pixels).convert("RGB").resize((side, side)).save(
                path / part / str(int(label)) / f"{number}.png"
            )
    return f"data={{name: folder, path: {path}, size: {side}}}"


def test_other_data_of_the_same_shape_is_evaluated_and_other_shapes_refused(tmp_path: Path) -> None:
    first = evaluated(tmp_path / "runs")
    other = folder_of_images(tmp_path / "pictures", 8)
    before = sorted((tmp_path / "runs").rglob("*"))
    with pytest.raises(
        ValueError, match=r"has images \(3, 8, 8\) of 10 classes, the model was made for \(1, 8, 8\)"
    ):
        evaluate_run(first.path, other)
    assert sorted((tmp_path / "runs").rglob("*")) == before


def test_a_sample_of_a_sorted_folder_has_every_class(tmp_path: Path) -> None:
    recipe = {"data": {"name": "digits"}, "model": {"name": "mlp"}, "threat": "linf:0.05"}
    data = folder_of_images(tmp_path / "pictures", 8).removeprefix("data=")
    run = evaluate_model(recipe, *ASKED, *QUICK, f"data={data}", "evaluation.examples=20", runs=tmp_path / "runs")
    assert run.examples["label"].nunique() == 10


def test_the_same_weights_on_other_images(tmp_path: Path) -> None:
    first = evaluated(tmp_path / "runs")
    test = load_data("digits").test
    images, labels = test.batch(slice(None))
    pixels = (255 * (1 - images[:, 0])).round().byte().numpy()  # their negatives
    for part in ("train", "test"):
        np.savez(tmp_path / f"{part}.npz", images=pixels, labels=labels.numpy())
    data = f"data={{name: arrays, train: [{tmp_path / 'train.npz'}], test: [{tmp_path / 'test.npz'}]}}"
    shifted = evaluate_run(first.path, data, runs=tmp_path / "runs")
    assert shifted.path.parent == first.path.parent
    assert shifted.path != first.path
    assert shifted.experiment.test_data.name == "arrays"
    assert shifted.experiment.data.name == "digits"
    chosen = shifted.examples["index"].to_numpy()
    with torch.no_grad():
        answers = Turned()(1 - images[chosen]).argmax(1)
    assert shifted.examples["prediction"].tolist() == answers.tolist()
    record = read_record(shifted.path)
    assert (record.values["evaluation.data"], record.values["data"]) == ("arrays", "digits")


def test_what_cannot_be_evaluated_again_keeps_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluated(tmp_path)

    def refuse(*arguments: object) -> None:
        raise ValueError("no such images today")

    monkeypatch.setattr("holdfast.experiments.runs.evaluation.rehearse_evaluation", refuse)
    with pytest.raises(ValueError, match="no such images"):
        evaluate_run(first.path, again=True)
    assert first.finished
