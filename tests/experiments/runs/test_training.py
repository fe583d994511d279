"""A run from recipe to folder: complete, never repeated, resumable."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TINY, linear_model
from torch import Tensor, nn

from holdfast import Threat, evaluate, load, train
from holdfast.bounds import UnsupportedOperator
from holdfast.certify import BoundCertifier, BranchAndBoundCertifier, Certificate, Certifier, SoundnessError
from holdfast.certify.certificate import Findings
from holdfast.data import drawn, load_data
from holdfast.experiments import Experiment, Run, analyze, evaluate_model, evaluate_run, find_run, resolve
from holdfast.experiments.analyses import Analysis
from holdfast.experiments.records.record import read_record
from holdfast.experiments.runs.folder import all_runs
from holdfast.experiments.schema import SCHEMA
from holdfast.models import Model
from holdfast.training import Reporter, TrainingDiverged


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train("digits", *TINY, runs=tmp_path_factory.mktemp("runs"))


def test_the_folder_holds_everything(tiny: Run) -> None:
    names = {str(path.relative_to(tiny.path)) for path in tiny.path.rglob("*") if path.is_file()}
    evaluation = {
        "recipe.yaml",
        "environment.json",
        "examples.parquet",
        "seconds.parquet",
        "result.json",
        "figures/sandwich.png",
        "figures/sandwich.pdf",
        "figures/sandwich.svg",
        "figures/sandwich.csv",
        "figures/adversarial-pgd.png",
        "figures/adversarial-pgd.pdf",
        "figures/adversarial-pgd.svg",
        "figures/adversarial-pgd.csv",
        "adversarial/pgd.npz",
    }
    training = {"recipe.yaml", "environment.json", "history.jsonl", "model.safetensors", "checkpoint/last.pt"}
    (below,) = (tiny.path / "evaluations").iterdir()
    assert names == training | {f"evaluations/{below.name}/{name}" for name in evaluation}
    asked = resolve("digits", TINY)
    assert tiny.path.name == asked.identity == tiny.trained_as
    assert below.name == asked.evaluation_identity(tiny.path.name)
    assert tiny.experiment == Run(below).experiment == asked
    assert tiny.schema == SCHEMA
    assert tiny.finished
    result = tiny.result
    assert {"standard", "attacked", "certified", "examples", "threat", "seconds"} <= set(result)
    assert result["examples"] == 60
    assert 0 <= result["certified"]["bounds"] <= result["attacked"]["pgd"] <= result["standard"] <= 1
    assert result["seconds"] > 0
    assert result["peak_memory_bytes"] > 1e6
    assert list(tiny.history["epoch"]) == [1, 2]
    assert {"loss", "validation_standard", "validation_attacked", "validation_certified"} <= set(tiny.history)
    packages = json.loads((tiny.path / "environment.json").read_text())["packages"]
    assert torch.__version__.startswith(packages["torch"])


def test_the_numbers_can_be_had_again_from_the_folder(tiny: Run) -> None:
    model, experiment = load(tiny.path), tiny.experiment
    assert not model.training
    test = load_data("digits").test
    chosen = drawn(test.labels, 60, 0)
    x, y = test.batch(chosen)
    settings = experiment.evaluation
    more = {"seed": experiment.seed, "lipschitz_examples": settings.lipschitz_examples}
    again = evaluate(model, x, y, experiment.threat, settings.attacks, settings.certifiers, **more)
    assert again.table.assign(index=chosen.numpy()).equals(tiny.examples)
    with np.load(tiny.evaluated.path / "adversarial" / "pgd.npz") as kept:
        before, after = kept["probabilities"], kept["probabilities_adv"]
        assert (before.argmax(1) == kept["label"]).all()
        assert (after.argmax(1) != kept["label"]).all()
        assert np.allclose(after.sum(1), 1)
        images, _ = test.batch(torch.from_numpy(kept["index"]))
        with torch.no_grad():
            assert np.allclose(model(images).softmax(1), before, atol=1e-6)


def test_a_finished_run_is_not_repeated_unless_asked(tiny: Run) -> None:
    result, weights = tiny.evaluated.path / "result.json", tiny.path / "model.safetensors"
    before, trained = result.stat().st_mtime_ns, weights.read_bytes()
    assert train("digits", *TINY, runs=tiny.path.parent) == tiny
    assert result.stat().st_mtime_ns == before
    train("digits", *TINY, runs=tiny.path.parent, again=True)
    assert result.stat().st_mtime_ns > before
    assert weights.read_bytes() == trained


def test_what_is_asked_of_a_trained_model_never_trains(tiny: Run, tmp_path: Path) -> None:
    shutil.copytree(tiny.path, tmp_path / tiny.path.name)
    weights = tmp_path / tiny.path.name / "model.safetensors"
    before = weights.stat().st_mtime_ns
    changes = [
        ("engine.accelerator=cpu",),
        ("evaluation.attacks=[fgsm]",),
        ("evaluation.certifiers=[{name: bounds, method: crown-ibp}]",),
        ("evaluation.examples=30",),
        ("evaluation.keep_adversarial=10", "evaluation.curve_points=0", "training.checkpoint_every=1"),
        ("evaluation.threat=linf:0.05",),
        ("evaluation.threat=linf:0.1", "evaluation.batch_size=32"),
    ]
    folders = [train("digits", *TINY, *change, runs=tmp_path).evaluated.path for change in changes]
    assert [run.path.name for run in all_runs(tmp_path)] == [tiny.path.name]
    assert weights.stat().st_mtime_ns == before
    assert len(set(folders)) == 5
    assert folders[0] == folders[4] == folders[6] == tmp_path / tiny.path.name / "evaluations" / tiny.asked
    # The first thirty of sixty are those drawn for thirty.
    few, many = Run(folders[3]).examples, tiny.examples
    assert few["index"].tolist() == many["index"].tolist()[:30]
    assert Run(tmp_path / tiny.path.name).evaluated.path == folders[5]


def test_an_analysis_that_did_not_see_the_training_trains_once_more(tiny: Run, tmp_path: Path) -> None:
    shutil.copytree(tiny.path, tmp_path / tiny.path.name)
    run = train("digits", *TINY, "analysis=[{name: neural-collapse}]", runs=tmp_path)
    assert run.path.name == tiny.path.name
    assert (run.path / "neural-collapse.parquet").is_file()
    assert (run.path / "model.safetensors").read_bytes() == (tiny.path / "model.safetensors").read_bytes()
    trained = (run.path / "history.jsonl").stat().st_mtime_ns
    train("digits", *TINY, "analysis=[{name: neural-collapse}]", "evaluation.attacks=[fgsm]", runs=tmp_path)
    assert (run.path / "history.jsonl").stat().st_mtime_ns == trained


class Stop(Reporter):
    """Stops a run after an epoch, as a power cut would."""

    def epoch(self, record: dict[str, object]) -> None:
        raise KeyboardInterrupt


def test_a_run_cut_off_goes_on_to_the_same_result(tiny: Run, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train("digits", *TINY, runs=tmp_path, reporter=Stop())
    run = Run(tmp_path / tiny.path.name)
    assert not run.finished
    with pytest.raises(FileNotFoundError, match="no trained model yet"):
        load(run.path)
    resumed = train("digits", *TINY, runs=tmp_path)
    assert resumed.examples.equals(tiny.examples)
    assert list(resumed.history["loss"]) == list(tiny.history["loss"])
    assert [one["step"] for one in resumed.stretches] == [0, 3]
    assert [one["step"] for one in tiny.stretches] == [0]
    for ours, theirs in zip(load(resumed.path).parameters(), load(tiny.path).parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_evaluating_again_gets_a_folder_of_its_own(tiny: Run) -> None:
    run = evaluate_run(tiny.path, "threat=linf:0.05", "evaluation.attacks=[fgsm]")
    assert run.path.parent == tiny.path / "evaluations"
    assert run.result["threat"] == "linf:0.05"
    assert list(run.result["attacked"]) == ["fgsm"]
    assert run.result["certified"]["bounds"] >= tiny.result["certified"]["bounds"]
    assert evaluate_run(tiny.path.name[:6], "threat=linf:0.05", "evaluation.attacks=[fgsm]", runs=tiny.path.parent)
    with pytest.raises(ValueError, match="would change the training"):
        evaluate_run(tiny.path, "objective=trades")
    with pytest.raises(ValueError, match="unknown key 'root'"):  # allowed, where the data set has one
        evaluate_run(tiny.path, "data.root=elsewhere")
    same = evaluate_run(tiny.path, "threat=linf:0.1", "data=digits")
    assert same.path == tiny.evaluated.path
    with pytest.raises(ValueError, match="did you mean 'pgd'"):
        evaluate_run(tiny.path, "evaluation.attacks=[pdg]")


def test_runs_are_found_by_path_name_or_beginning(tiny: Run) -> None:
    assert find_run(tiny.path, Path("elsewhere")) == tiny
    assert find_run(tiny.path.name[:5], tiny.path.parent) == tiny
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        find_run("nothing", tiny.path.parent)


def test_damaged_files_are_named(tiny: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.path.mkdir()
    for name in ("recipe.yaml", "model.safetensors"):
        (run.path / name).write_bytes((tiny.path / name).read_bytes())
    assert isinstance(load(run.path), nn.Module)
    for text, words in (
        ("schema: 2\ndata: 3\n", "data:"),
        ("- 3", "holds no recipe"),
        ("schema: 99\n", "schema 99"),
    ):
        (run.path / "recipe.yaml").write_text(text)
        with pytest.raises(ValueError, match=f"cannot be read: .*{words}"):
            load(run.path)
    (run.path / "recipe.yaml").write_bytes((tiny.path / "recipe.yaml").read_bytes())
    (run.path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        load(run.path)


def test_a_damaged_checkpoint_stops_a_run_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train("digits", *TINY, runs=tmp_path, reporter=Stop())
    checkpoint = next(tmp_path.glob("*/checkpoint/last.pt"))
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cannot be read .*delete it to start anew"):
        train("digits", *TINY, runs=tmp_path)


class Wavy(Model):
    """A network whose bounds nobody knows."""

    name = "wavy"

    def network(self, input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        class Sine(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.sin(x)

        return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes), Sine())


def changed(**parts: object) -> Experiment:
    return resolve("digits", TINY).model_copy(update=parts)


def test_what_cannot_be_certified_fails_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOperator, match=r"'2' \(sin\)"):
        train(changed(model=Wavy()), runs=tmp_path)
    with pytest.raises(FileNotFoundError, match="not there"):
        train("mnist-ibp", f"data.root={tmp_path / 'gone'}", runs=tmp_path)
    with pytest.raises(ValueError, match=r"outside|box is"):
        train("digits", "threat={norm: linf, eps: 0.1, low: 0.5, high: 1}", *TINY, runs=tmp_path)
    with pytest.raises(ValueError, match="train_size=100000"):
        train("digits", "data.train_size=100000", runs=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_diverging_run_keeps_its_last_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match="the loss is"):
        train("digits", *TINY, "optimizer={name: sgd, lr: 1e30}", "schedule=constant", runs=tmp_path)
    assert not list(tmp_path.rglob("result.json"))
    (run,) = all_runs(tmp_path)
    assert (run.path / "failed.txt").read_text().startswith("TrainingDiverged: the loss is")
    assert read_record(run.path).status == "failed"


def test_a_threat_without_a_box_runs_and_reads_back(tmp_path: Path) -> None:
    box = "threat={norm: linf, eps: 0.1, low: -.inf, high: .inf}"
    run = train("digits", *TINY, box, runs=tmp_path)
    assert run.experiment.threat.low == -np.inf
    assert run.trained_as == run.path.name


def test_an_evaluation_that_cannot_be_writes_nothing(tiny: Run, tmp_path: Path) -> None:
    before = sorted(tiny.path.rglob("*"))
    with pytest.raises(ValueError, match="box is"):
        evaluate_run(tiny.path, "threat={norm: linf, eps: 0.1, low: 0.5, high: 1}")
    assert sorted(tiny.path.rglob("*")) == before


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train("digits", *TINY, runs=tmp_path, reporter=Stop())
    path = next(tmp_path.glob("*/checkpoint/last.pt"))
    for change in ({"model": {}}, {"history": None}, {"model": 3}):
        checkpoint = torch.load(path, weights_only=True)
        torch.save({**checkpoint, **change}, path)
        with pytest.raises(ValueError, match=r"delete it to start anew") as caught:
            train("digits", *TINY, runs=tmp_path)
        assert ("missing 1.weight" in str(caught.value)) == (change == {"model": {}})
        torch.save(checkpoint, path)


def test_the_alarm_keeps_the_example_that_rang_it(tmp_path: Path) -> None:
    class TooSure(BoundCertifier):
        def __call__(self, model, x, y, threat, **more) -> Certificate:  # type: ignore[no-untyped-def,override]
            sure = super().__call__(model, x, y, threat.with_eps(0.0), **more)
            return sure if len(x) == 60 else super().__call__(model, x, y, threat, **more)

    certifiers: list[Certifier] = [TooSure()]
    experiment = changed()
    evaluation = experiment.evaluation.model_copy(update={"certifiers": certifiers})
    with pytest.raises(SoundnessError, match="is certified by bounds"):
        train(changed(evaluation=evaluation), runs=tmp_path)
    (alarm,) = tmp_path.rglob("alarm.npz")
    with np.load(alarm) as kept:
        assert kept["part"] == "test"
        assert kept["x"].shape == kept["x_adv"].shape == (1, 8, 8)
    assert not list(tmp_path.rglob("result.json"))


def colour_net(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, num_classes))


def test_a_model_for_other_images_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    class ColourNet(Model, name="colour-net"):
        def network(self, input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
            return colour_net(input_shape, num_classes)

    try:
        with pytest.raises(ValueError, match=r"does not take images of \(1, 8, 8\): .*expected input.* 3 channels"):
            train("digits", "model=colour-net", runs=tmp_path / "runs")
    finally:
        del Model.registry["colour-net"]
    assert not (tmp_path / "runs").exists()


def test_a_last_batch_that_batch_norm_cannot_use_is_refused_before_the_first(tmp_path: Path) -> None:
    settings = [o for o in TINY if "train_size" not in o and not o.startswith("model")]
    with pytest.raises(ValueError, match=r"batch_size=40 leaves a last batch of one image"):
        train("digits", *settings, "data.train_size=121", "model=resnet18", runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


class Odd(nn.Module):
    """Answers in a way of its own, in train mode or always."""

    def __init__(self, network: nn.Module, way: str) -> None:
        super().__init__()
        self.network, self.way = network, way

    def forward(self, x: Tensor) -> object:
        logits = self.network(x)
        if self.way == "crash":
            raise KeyError("features")
        if self.way == "half":
            return logits.bfloat16()
        return (logits, x) if self.way == "pair" or self.training else logits


def odd_net(input_shape: tuple[int, ...], num_classes: int, way: str = "") -> nn.Module:
    network = linear_model(num_classes, input_shape)
    return network.double() if way == "double" else network.to("meta") if way == "meta" else Odd(network, way)


ODD = {
    "double": r"weights are float64, .* call model.float\(\)",
    "meta": "device meta",
    "pair": "return the logits alone",
    "crash": "KeyError: 'features'",
}


@pytest.mark.parametrize("way", ["auxiliary", *ODD])
@pytest.mark.parametrize("objective", ["trades", "ibp", "cross-entropy"])
def test_a_model_that_gives_no_logits_is_not_trained_and_nothing_is_written(
    tmp_path: Path, way: str, objective: str
) -> None:
    model = f"model={{name: factory, path: '{__name__}:odd_net', arguments: {{way: {way}}}}}"
    plain = [setting for setting in TINY if not setting.startswith("model")]
    with pytest.raises(ValueError, match=ODD.get(way, "return the logits alone")):
        train("digits", *plain, model, f"objective={objective}", "evaluation.certifiers=[]", runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_logits_of_another_type_than_the_images_are_evaluated(tmp_path: Path) -> None:
    model = {"name": f"{__name__}:odd_net", "arguments": {"way": "half"}}
    recipe = {"data": {"name": "digits"}, "model": model, "threat": "linf:0.1"}
    asked = ("evaluation.certifiers=[]", "evaluation.attacks=[{name: pgd, steps: 3}]", "evaluation.examples=40")
    run = evaluate_model(recipe, *asked, "evaluation.curve_points=2", runs=tmp_path / "runs")
    assert run.result["attacked"]["pgd"] <= run.result["standard"]


@pytest.mark.parametrize("way", ODD)
def test_a_model_that_gives_no_logits_is_not_evaluated_and_nothing_is_written(tmp_path: Path, way: str) -> None:
    model = {"name": f"{__name__}:odd_net", "arguments": {"way": way}}
    recipe = {"data": {"name": "digits"}, "model": model, "threat": "linf:0.1"}
    with pytest.raises(ValueError, match=ODD[way]):
        evaluate_model(recipe, "evaluation.certifiers=[]", runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_an_analysis_of_a_model_that_gives_no_logits_writes_nothing(
    tiny: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(tiny.path.rglob("*"))
    odd = ((tiny.model().double(), r"model\.float"), (Odd(tiny.model(), "pair"), "logits alone"))
    for model, message in odd:
        monkeypatch.setattr(Run, "model", lambda run, model=model: model)
        for name in ("local-lipschitz", "lipschitz", "landscape", "neural-collapse"):
            with pytest.raises(ValueError, match=message):
                analyze(tiny.path, Analysis.parse(name))
    assert sorted(tiny.path.rglob("*")) == before


def test_validation_asks_what_a_dear_certifier_begins_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, findings = [], BranchAndBoundCertifier.findings

    def counted(self: BranchAndBoundCertifier, model: nn.Module, x: Tensor, *more: Any) -> Findings:
        asked.append(len(x))
        return findings(self, model, x, *more)

    monkeypatch.setattr(BranchAndBoundCertifier, "findings", counted)
    slow = "evaluation.certifiers=[{name: branch-and-bound, seconds: 0.01}]"
    run = train("digits", *TINY, slow, "evaluation.examples=3", "evaluation.curve_points=0", runs=tmp_path)
    assert run.history["validation_certified"].between(0, 1).all()
    assert asked[-1] == 3
    assert sum(asked) < 10  # the rest are a rehearsal's


@pytest.mark.parametrize("first", ["{name: bounds, method: cascade, radius_search: never}", "branch-and-bound"])
def test_validation_asks_once_what_stands_for_several_certifiers(first: str, tmp_path: Path) -> None:
    both = f"evaluation.certifiers=[{first}, {{name: branch-and-bound, seconds: 0.01}}]"
    run = train("digits", *TINY, both, "evaluation.examples=3", "evaluation.curve_points=0", runs=tmp_path)
    assert run.history["validation_certified"].between(0, 1).all()
    assert len(run.result["certified"]) == 2


@pytest.mark.parametrize("other", [False, True])
def test_what_validation_asks_is_rehearsed(other: bool, tmp_path: Path) -> None:
    class Short(BoundCertifier):
        def __call__(self, model, x, y, threat, **more) -> Certificate:  # type: ignore[no-untyped-def,override]
            if threat.eps == changed().threat.eps:
                raise ValueError("nothing of this radius")
            return super().__call__(model, x, y, threat, **more)

    class Long(BoundCertifier):
        @property
        def in_training(self) -> Certifier:
            return Short()

    certifier = Short() if other else Long()
    update = {"certifiers": [certifier], "threat": Threat("linf", 0.01) if other else None}
    evaluation = changed().evaluation.model_copy(update=update)
    with pytest.raises(ValueError, match="nothing of this radius"):
        train(changed(evaluation=evaluation), runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_the_rehearsal_leaves_the_statistics_of_batch_norm_alone(tmp_path: Path) -> None:
    kept = {}

    class Look(Reporter):
        def begin(self, folder: Path) -> None:
            kept.update(probe[0].state_dict())
            raise KeyboardInterrupt

    probe: list[nn.Module] = []

    class Normed(Model, name="normed"):
        def network(self, input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
            probe.append(nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, num_classes)))
            return probe[0]

    try:
        with pytest.raises(KeyboardInterrupt):
            train(
                "digits",
                *[o for o in TINY if not o.startswith("model")],
                "model=normed",
                runs=tmp_path,
                reporter=Look(),
            )
    finally:
        del Model.registry["normed"]
    assert kept["0.num_batches_tracked"] == 0
    assert kept["0.running_mean"] == 0
