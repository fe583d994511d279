"""Neural collapse in training and of a run: the very images, the right labels, the same after a kill."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import TINY, images, small_cnn
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from holdfast import Threat
from holdfast.analysis import neural_collapse
from holdfast.cli import app
from holdfast.cli.console import ProgressLine
from holdfast.data import ImageSet
from holdfast.experiments import Run
from holdfast.experiments.analyses import LandscapeAnalysis, NeuralCollapseAnalysis
from holdfast.experiments.analyses.analysis import ModelAnalysis
from holdfast.experiments.analyses.neural_collapse import noisy
from holdfast.experiments.analyses.published_collapse import read_published_collapse
from holdfast.inference import frozen_eval
from holdfast.models import features
from holdfast.models.features import collect_layers
from holdfast.objectives import TRADES, AdversarialTraining, CrossEntropy, Progress
from holdfast.training import SGD, Constant, Observer, Training, fit
from holdfast.training.checkpoint import Checkpoint
from holdfast.training.engine import Engine

COLLAPSE = "analysis=[{name: neural-collapse, collections: [clean, adversarial, targeted, sign-noise], steps: 2}]"
FAST = ("evaluation.certifiers=[]", "evaluation.train_examples=2", "evaluation.lipschitz_examples=2")


def holdfast(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_very_inputs_of_the_epoch_with_the_weights_it_ended_with() -> None:
    x, y = images(40)
    data = ImageSet((255 * x).round().to(torch.uint8), y, tuple("abcd"))
    model, threat = small_cnn(), Threat("linf", 0.1)
    watcher = NeuralCollapseAnalysis(collections=["adversarial"]).watch(
        model, AdversarialTraining(), threat, lambda progress: 0.1
    )
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    class Witness(Observer):
        def observe(self, x: Tensor, y: Tensor, x_adv: Tensor | None, progress: Progress) -> None:
            assert x_adv is not None
            seen.append((x.clone(), y.clone(), x_adv.clone()))

        def record(self) -> dict[str, Any]:
            return {}

    settings = AdversarialTraining(steps=2), threat, SGD(lr=0.1), Constant(), Training(epochs=1, batch_size=16)
    (record,) = fit(model, data, *settings, Engine(accelerator="cpu").start(), observers=[watcher, Witness()])
    clean, labels, adversarial = (torch.cat([part[i] for part in seen]) for i in range(3))
    assert len(clean) == 40
    for name, inputs in (("clean", clean), ("adversarial", adversarial)):
        with frozen_eval(model), torch.no_grad():
            found = features(model)(inputs)
        expected = neural_collapse(found.features, labels, found.head.weight, found.head.bias)
        assert record[f"{name}_nc1"] == pytest.approx(expected.nc1, rel=1e-4)
        assert record[f"{name}_nc3"] == pytest.approx(expected.nc3, rel=1e-4)
    assert int(model[1].num_batches_tracked) == 3  # measuring leaves no trace


@pytest.mark.parametrize("analysis", [NeuralCollapseAnalysis(every=2, examples=30), LandscapeAnalysis(every=2)])
def test_a_training_cut_off_within_an_epoch_records_what_a_straight_one_does(analysis: ModelAnalysis) -> None:
    x, y = images(40)
    data = ImageSet((255 * x).round().to(torch.uint8), y, tuple("abcd"))
    objective, threat = AdversarialTraining(steps=1), Threat("linf", 0.1)
    settings = objective, threat, SGD(lr=0.1), Constant(), Training(epochs=4, batch_size=8, checkpoint_every=1)
    histories, states = [], [None]

    def save(checkpoint: Checkpoint) -> None:
        if checkpoint.step in (2, 5, 8, 13) and len(histories) == 0:
            states.append(copy.deepcopy(checkpoint))

    while states:
        model = small_cnn()
        watcher = analysis.watch(model, objective, threat, lambda progress: 0.1)
        assert watcher is not None
        engine, state = Engine(accelerator="cpu").start(), states.pop(0)
        if state is not None:
            model.load_state_dict(state.model)
        history = fit(model, data, *settings, engine, observers=[watcher], save=save, resume=state)
        histories.append([{k: v for k, v in record.items() if "seconds" not in k} for record in history])
    assert len(histories) == 5
    assert all(history == histories[0] for history in histories[1:])
    measured = [record["epoch"] for record in histories[0] if "neural_collapse" in record]
    assert measured == ([2, 4] if isinstance(analysis, NeuralCollapseAnalysis) else [])


def test_a_run_records_is_resumed_and_analysed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["train", "digits", "objective={name: adversarial, steps: 2}", *TINY, *FAST, COLLAPSE]
    command += ["training.keep_every=1", "--runs"]
    straight = holdfast(*command, tmp_path / "straight")
    assert straight.exit_code == 0, straight.output
    run = Run(Path(straight.stdout.splitlines()[-1]))

    def interrupt(self: ProgressLine, record: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ProgressLine, "epoch", interrupt)
        assert holdfast(*command, tmp_path / "cut").exit_code == 1
    resumed = holdfast(*command, tmp_path / "cut")
    again = Run(Path(resumed.stdout.splitlines()[-1]))
    table = pd.read_parquet(run.path / "neural-collapse.parquet")
    pd.testing.assert_frame_equal(table, pd.read_parquet(again.path / "neural-collapse.parquet"))
    assert list(table.columns) == ["epoch", "collection", "layer", "metric", "class", "value"]
    assert set(table["epoch"]) == {1, 2}
    assert set(table["collection"]) == {"clean", "adversarial", "targeted", "sign-noise"}
    headline = table.query("epoch == 2 and collection == 'clean' and metric == 'nc1'")["value"].item()
    assert run.history["clean_nc1"].iloc[-1] == pytest.approx(headline)

    result = holdfast(
        *("analyze", run.path, "neural-collapse", "--checkpoints", "all", "--with", again.path, "examples=60"),
        *("layers=[1]", "collections=[adversarial, targeted, test, test-adversarial, gaussian-noise]", "steps=2"),
    )
    assert result.exit_code == 0, result.output
    folder = Path(result.stdout.splitlines()[-1])
    names = {path.name for path in folder.iterdir()}
    assert {"collapse.csv", "curves.png", "matrices.pdf", "layers.png"} <= names
    curves = pd.read_csv(folder / "curves.csv")
    assert set(curves["epoch"]) == {1, 2}
    matrices = pd.read_csv(folder / "matrices.csv").set_index(["collection", "matrix"])
    leaps = matrices.loc[("clean", "leap")].pivot(index="row", columns="column", values="value").to_numpy()
    assert np.allclose(leaps.sum(1), 1)
    angles = matrices.loc[("clean", "angle")].pivot(index="row", columns="column", values="value").to_numpy()
    assert np.allclose(np.diag(angles), 0)
    assert np.allclose(angles, angles.T, atol=1e-6)
    layers = pd.read_csv(folder / "layers.csv")
    assert set(layers["layer"]) == {"1", "last features"}
    plain = holdfast("analyze", run.path, "neural-collapse", "examples=60", "steps=2")  # its record is enough
    assert "curves.png" in {path.name for path in Path(plain.stdout.splitlines()[-1]).iterdir()}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["analysis=[{name: neural-collapse, collections: [test]}]"], "no test images are seen while training"),
        (["analysis=[{name: neural-collapse, layers: [nope]}]"], "'nope' is not a module"),
        (["analysis=[neural-collapse, {name: neural-collapse, steps: 3}]"], "stands there twice"),
        (["analysis=[{name: neural-collapse, collections: [sign-noise]}]", "threat=l0:5"], "no size in l_0"),
        (
            ["objective={name: trades, frozen_statistics: true}", "training.averaging={kind: ema}"],
            "exclude one another",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_training(
    settings: list[str], message: str, tmp_path: Path
) -> None:
    refused = holdfast("train", "digits", "objective=cross-entropy", *TINY, *FAST, *settings, "--runs", tmp_path)
    assert refused.exit_code == 2, refused.output
    assert message in refused.output
    assert not list(tmp_path.iterdir())


def test_images_that_were_left_alone_stand_for_themselves() -> None:
    x, y = images(40)
    model = small_cnn()
    watcher = NeuralCollapseAnalysis().watch(model, CrossEntropy(), Threat("linf", 0.1), lambda progress: 0.1)
    watcher.begin(1, [])
    watcher.observe(x[:20], y[:20], None, Progress(0, 2))
    watcher.observe(x[20:], y[20:], x[20:], Progress(1, 2))
    rows = {(row[0], row[2]): row[4] for row in watcher.record()["neural_collapse"] if row[3] is None}
    assert rows["adversarial", "distance"] == 0
    assert rows["adversarial", "nc1"] == rows["clean", "nc1"]


def test_the_final_weights_stand_at_the_epoch_they_come_from(tmp_path: Path) -> None:
    settings = [*TINY, *FAST, "training={epochs: 4, batch_size: 40, keep_every: 1, watch: standard}"]
    trained = holdfast("train", "digits", "objective=cross-entropy", *settings, "--runs", tmp_path)
    run = Run(Path(trained.stdout.splitlines()[-1]))
    best = int(run.history["validation_standard"].argmax()) + 1
    result = holdfast("analyze", run.path, "neural-collapse", "--checkpoints", "all", "collections=[clean]")
    table = pd.read_csv(Path(result.stdout.splitlines()[-1]) / "collapse.csv")
    nc1 = table.query("metric == 'nc1'").set_index("epoch")["value"]
    assert sorted(nc1.index) == [1, 2, 3, 4]
    state = run.kept[best]
    assert all(torch.equal(state[name], value) for name, value in run.model().state_dict().items())


def test_epochs_between_two_measurements_have_no_rows() -> None:
    row = ["clean", "last features", "nc1", None, 0.5]
    history = [{"epoch": 1, "neural_collapse": math.nan}, {"epoch": 2, "neural_collapse": [row]}, {"epoch": 3}]
    table = NeuralCollapseAnalysis(every=2).table(history)
    assert table is not None
    assert table.to_numpy().tolist() == [[2, *row]]
    assert NeuralCollapseAnalysis().table(history[:1]) is None


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    trained = holdfast("train", "digits", "objective=cross-entropy", *TINY, *FAST, "--runs", tmp_path)
    run = Path(trained.stdout.splitlines()[-1])
    for settings, hint in (
        (["--checkpoints", "all"], "training.keep_every=1"),
        (["layers=[9]"], "'9' is not a module of"),
        (["head=hed"], "'hed' is not a module of"),
        (["collections=[clena]"], "collections"),
        ([f"published={tmp_path / 'none'}"], "there is no folder"),
    ):
        refused = holdfast("analyze", run, "neural-collapse", *settings)
        assert refused.exit_code == 2, refused.output
        assert hint in refused.output
    smooth = ("objective=cross-entropy", "training.label_smoothing=0.1", COLLAPSE)
    assert holdfast("train", "digits", *TINY, *FAST, *smooth, "--runs", tmp_path).exit_code == 0


def test_a_targeted_attack_lands_on_its_targets_and_noise_does_not() -> None:
    x, y = images(60)
    model, threat = small_cnn(), Threat("linf", 1.0)
    analysis = NeuralCollapseAnalysis(collections=["targeted", "sign-noise"], steps=30)
    with torch.no_grad():
        model.eval()
        y = model(x).argmax(1)
    rows, _ = analysis.measure(model, dict(analysis.images(model, {"clean": (x, y)}, threat)))
    found = {(row[0], row[2]): row[4] for row in rows if row[3] is None}
    assert found["targeted", "on_target"] > 0.4 > found["targeted", "ncc_accuracy_clean_centres"]
    assert ("sign-noise", "on_target") not in found
    assert ("clean", "angle") not in found


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.01), ("l2", 0.3), ("l1", 2.0)])
def test_noise_has_the_length_it_says(norm: str, eps: float) -> None:
    x = torch.full((400, 1, 8, 8), 0.5)
    threat = Threat(norm, eps)
    length = {"linf": 8 * eps, "l2": eps, "l1": eps / 8}[norm]
    lengths = {
        kind: (noisy(x, threat, kind) - x).flatten(1).norm(dim=1)
        for kind in ("sign-noise", "sphere-noise", "gaussian-noise")
    }
    for kind in ("sign-noise", "sphere-noise"):
        assert torch.allclose(lengths[kind], torch.full((400,), length), rtol=1e-4)
    assert lengths["gaussian-noise"].square().mean().sqrt().item() == pytest.approx(length, rel=0.02)
    assert lengths["gaussian-noise"].std() > 0.05 * length
    assert torch.allclose(threat.distance(x, noisy(x, threat, "sign-noise")), torch.full((400,), eps), rtol=1e-4)
    assert torch.equal(noisy(x, threat, "sign-noise"), noisy(x, threat, "sign-noise"))


def test_layers_by_name_and_a_head_that_is_not_linear() -> None:
    x, _ = images(20)
    model = small_cnn().eval()
    found = collect_layers(model, x, ["0", "6"], batch_size=7)
    with torch.no_grad():
        assert torch.allclose(found.layers["0"], model[0](x).mean((2, 3)), atol=1e-6)
        assert torch.allclose(found.layers["6"], found.logits)
        assert torch.allclose(model[6](found.features), model(x), atol=1e-6)
    assert found.head is model[6]
    convolutional = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 6), nn.Flatten())
    with pytest.raises(ValueError, match="calls no linear layer"):
        collect_layers(convolutional, x)
    named = collect_layers(convolutional, x, head="2")
    assert named.features.shape == (20, 5)
    assert named.head is convolutional[2]


def test_trades_with_frozen_statistics_is_the_published_variant() -> None:
    x, y = images(16)
    model, threat = small_cnn().train(), Threat("linf", 0.1)
    loss = TRADES(steps=2, frozen_statistics=True).loss(model, x, y, threat, Progress.end())
    loss.total.backward()
    assert model[1].num_batches_tracked == 0
    assert model.training
    assert model[1].training
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_published_files_are_read(tmp_path: Path) -> None:
    np.save(tmp_path / "nc1.npy", np.array([3.0, 1.0], dtype=np.float32))
    np.save(tmp_path / "robust_activation_nc2_angle.npy", np.array([0.5, 0.25]))
    np.save(tmp_path / "clean_robust_angle.npy", np.arange(6.0).reshape(2, 3))
    np.save(tmp_path / "muG_angle.npy", np.array([[0.1], [0.2]]))
    np.save(tmp_path / "somebody_elses.npy", np.zeros(3))
    table = read_published_collapse(tmp_path).set_index(["collection", "metric", "epoch"])
    assert table.loc[("clean", "nc1", 2), "value"].item() == 1.0
    assert table.loc[("adversarial", "nc2_angle_means", 2), "value"].item() == 0.25
    assert table.loc[("adversarial", "angle_class", 2), "value"].tolist() == [3, 4, 5]
    assert math.isnan(table.loc[("adversarial", "global_angle", 1), "class"].item())
    assert len(table) == 2 + 2 + 6 + 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="none of the known"):
        read_published_collapse(tmp_path / "empty")
