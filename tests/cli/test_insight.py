"""evaluate with several threats and methods, analyze, export: as a user meets them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import TINY
from typer.testing import CliRunner, Result

from holdfast.cli import app
from holdfast.cli.evaluate import several
from holdfast.experiments import Run


def holdfast(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    objective = "objective={name: crown-ibp, beta: 1.0}"
    result = holdfast("train", "digits", *TINY, objective, "analysis=[{name: landscape, every: 2}]", "--runs", runs)
    assert result.exit_code == 0, result.output
    return Path(result.stdout.splitlines()[-1])


def test_a_radius_alone_takes_the_norm_before_it() -> None:
    assert several("linf:2/255,4/255,l2:0.5, 1") == ["linf:2/255", "linf:4/255", "l2:0.5", "l2:1"]
    assert several(None) == []


def test_one_table_for_several_threats_and_methods(run: Path) -> None:
    result = holdfast("evaluate", run, "--threat", "linf:0.01,0.02", "--methods", "ibp,crown,cascade")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["linf:0.01", "linf:0.02"] in lines
    shown = {line[0] if line[0] != "Certified" else line[1].strip("()"): line for line in lines if line}
    last = Run(Path(result.stdout.splitlines()[-1])).result
    for name, label in (("IBP", "ibp"), ("CROWN", "crown"), ("CASCADE", "cascade")):
        value = last["certified"][f"bounds(method={label})"] if label != "ibp" else None
        if value is not None:
            assert shown[name][-2:] == [f"{100 * value:.1f}", "%"]
    late = holdfast("evaluate", run, "--threat", "linf:0.015,foo")
    assert late.exit_code == 2
    assert "given 'foo'" in late.output
    assert not any("0.015" in path.read_text() for path in run.glob("evaluations/*/recipe.yaml"))
    typo = holdfast("evaluate", run, "--methods", "ibp,crwn")
    assert typo.exit_code == 2
    assert "given 'crwn'" in typo.output


def test_the_landscape_is_recorded_while_training_and_drawn_afterwards(run: Path) -> None:
    history = Run(run).history
    assert (history["landscape_loss_low"] <= history["landscape_loss_high"]).all()
    result = holdfast("analyze", run, "landscape", "batch=16", "--with", run)
    assert result.exit_code == 0, result.output
    folder = Path(result.stdout.splitlines()[-1])
    names = {path.name for path in folder.iterdir()}
    assert {"band.png", "band.csv", "tightness.png", "tightness.pdf", "landscape.csv"} <= names
    step = pd.read_csv(folder / "landscape.csv")
    assert set(step["relaxation"]) >= {"ibp", "crown-ibp adaptive", "one-step"}
    assert step["smoothness"].between(0, 1e9).all()
    for arguments, hint in (
        (("analyze", run, "landscpe"), "did you mean 'landscape'"),
        (("analyze", run, "landscape", "bach=3"), "did you mean 'batch'"),
        (("analyze", run / "nowhere", "landscape"), "is not a run folder"),
    ):
        refused = holdfast(*arguments)
        assert refused.exit_code == 2
        assert hint in refused.output


def test_what_is_undecided_is_exported(run: Path, tmp_path: Path) -> None:
    result = holdfast("export", run, tmp_path / "problems", "--threat", "linf:0.2", "--examples", "2")
    assert result.exit_code == 0, result.output
    instances = Path(result.stdout.splitlines()[-1])
    assert len(instances.read_text().splitlines()) == 2
    assert (instances.parent / "model.onnx").exists()
    assert holdfast("export", run, tmp_path / "other", "--threat", "l2:1").exit_code == 2


def test_a_lipschitz_network_from_training_to_its_constants(tmp_path: Path) -> None:
    overrides = (
        *("model={name: aol-mlp, width: 64, depth: 2}", "threat=l2:36/255", "objective=offset-cross-entropy"),
        *("evaluation.certifiers=[lipschitz]", "evaluation.radii=[0, 36/255, 1]"),
    )
    result = holdfast("train", "digits", *TINY, *overrides, "--runs", tmp_path)
    assert result.exit_code == 0, result.output
    run = Run(Path(result.stdout.splitlines()[-1]))
    shown = next(line.split() for line in result.stdout.splitlines() if line.split()[:1] == ["lipschitz"])
    found = run.result["certified_at"]["lipschitz"]
    assert list(found) == ["l2:0.0", "l2:36/255", "l2:1.0", "mean radius"]
    assert found["l2:36/255"] == run.result["certified"]["lipschitz"]
    assert found["l2:0.0"] >= found["l2:36/255"] >= found["l2:1.0"]
    assert shown[1] == f"{100 * found['l2:0.0']:.1f}"
    analysis = holdfast("analyze", run.path, "lipschitz", "batch=4")
    assert analysis.exit_code == 0, analysis.output
    assert "AOLLinear" in analysis.output
    layers = pd.read_csv(Path(analysis.stdout.splitlines()[-1]) / "layers.csv")
    assert (layers["found"] <= layers["verified"] * (1 + 1e-5)).all()
    refused = holdfast(
        "evaluate", run.path, "evaluation.certifiers=[smoothing]", "evaluation.radii=[]", "--threat", "linf:0.1"
    )
    assert refused.exit_code == 2
    assert "gaussian noise certifies l2" in refused.output


def test_local_lipschitz_of_a_run(run: Path) -> None:
    result = holdfast("analyze", run, "local-lipschitz", "examples=8", "steps=5", "on=margins")
    assert result.exit_code == 0, result.output
    table = pd.read_csv(Path(result.stdout.splitlines()[-1]) / "quotients.csv")
    assert len(table) == 8
    assert table["radius"].between(0, 1).all()  # of the run's own certificates
    assert (table["quotient"] <= table["upper"]).all()
    assert holdfast("analyze", run, "local-lipschitz", "on=logit").exit_code == 2


def test_the_attacks_of_a_run_are_checked(run: Path) -> None:
    strong = "attacks=[{name: pgd, steps: 40, loss: margin}]"
    result = holdfast("analyze", run, "attack-check", "examples=8", "draws=20", strong)
    assert result.exit_code == 0, result.output
    assert "it misses most of what is there" not in " ".join(result.stdout.split())
    table = pd.read_csv(Path(result.stdout.splitlines()[-1]) / "images.csv")
    assert list(table) == ["index", "made", "random search", "pgd"]
    assert table["made"].all()
    assert table["pgd"].mean() > max(0.5, table["random search"].mean())
    weak = "attacks=[{name: pgd, steps: 1, step_size: 0.01, random_start: false}]"
    result = holdfast("analyze", run, "attack-check", "examples=8", "draws=20", weak)
    assert "it misses most of what is there" in " ".join(result.stdout.split())
    assert holdfast("analyze", run, "attack-check", "threat=linf:0").exit_code == 2


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A small data set of arrays with a repeated image, the same one under two labels, and a mislabelled one."""
    generator = np.random.default_rng(0)
    centres = np.array([40, 120, 200])
    labels = {"train": np.arange(60) % 3, "test": np.arange(12) % 3}
    for part, y in labels.items():
        x = (centres[y][:, None, None] + generator.integers(-15, 16, (len(y), 6, 6))).astype(np.uint8)
        if part == "train":
            x[3] = x[0]  # both of class 0
            x[7] = x[9]  # classes 1 and 0
            x[12] = 200 + generator.integers(-15, 16, (6, 6))  # of class 0, but looks like class 2
        else:
            x[4] = x[5]  # classes 1 and 2
        np.savez(tmp_path / f"{part}.npz", image=x, label=y)
    return tmp_path


def test_the_separation_of_a_data_set(pictures: Path, tmp_path: Path) -> None:
    data = (f"data.train=[{pictures / 'train.npz'}]", f"data.test=[{pictures / 'test.npz'}]")
    result = holdfast("analyze", "arrays", "separation", *data, "threat=linf:8/255", "--runs", tmp_path / "runs")
    assert result.exit_code == 0, result.output
    folder = Path(result.stdout.splitlines()[-1])
    assert {"distances.png", "pairs.pdf", "repeated.csv"} <= {path.name for path in folder.iterdir()}
    distances = pd.read_csv(folder / "distances.csv").set_index(["part", "index"])
    assert len(distances) == 72
    assert distances.loc[("train", 7), "distance"] == 0
    assert distances.loc[("train", 7), "neighbour"] == 9
    assert distances.loc[("test", 1), "distance"] > 0.1
    pairs = pd.read_csv(folder / "pairs.csv").set_index(["part", "index"])
    assert "the same image under two labels" in set(pairs["note"])
    assert any("12 is nearer to the other than to its own class" in str(note) for note in pairs["note"])
    repeated = pd.read_csv(folder / "repeated.csv")
    assert sorted(repeated.groupby("group")["index"].apply(tuple)) == [(0, 3), (4, 5), (7, 9)]
    assert repeated.groupby("group")["labels_differ"].first().tolist().count(True) == 2
    reasons = tmp_path / "exclude.csv"
    reasons.write_text("part,index,reason\ntrain,7,the same image as 9\ntrain,12,looks like class 2\n")
    again = holdfast(
        *("analyze", "arrays", "separation", *data, "threat=linf:8/255", f"exclude={reasons}", "examples=20"),
        *("--runs", tmp_path / "other"),
    )
    assert again.exit_code == 0, again.output
    folder = Path(again.stdout.splitlines()[-1])
    assert "left out" in again.stdout
    assert pd.read_csv(folder / "excluded.csv")["index"].tolist() == [7, 12]
    left = pd.read_csv(folder / "distances.csv")
    assert not left.query("part == 'train'")["index"].isin([7, 12]).any()
    assert not left["neighbour"].isin([7, 12]).any()
    assert (left.query("part == 'train'")["distance"] > 0).all()
    for line, hint in (
        ("train,7,", "without a reason"),
        ("train,999,gone", "999 is not one of 0 to 59"),
        ("tests,7,why", "neither train nor test"),
    ):
        reasons.write_text(f"part,index,reason\n{line}\n")
        refused = holdfast(
            "analyze", "arrays", "separation", *data, f"exclude={reasons}", "--runs", tmp_path / "no"
        )
        assert refused.exit_code == 2
        assert hint in refused.output
    assert not (tmp_path / "no").exists()


def test_the_separation_at_the_edges(tmp_path: Path) -> None:
    """Classes exactly 2 eps apart; one class alone; settings that would do nothing; stale files."""
    grey = np.repeat(np.array([100, 108], dtype=np.uint8), 20)[:, None, None] * np.ones((1, 4, 4), dtype=np.uint8)
    labels = np.repeat([0, 1], 20)
    for name, y in (("two", labels), ("one", 0 * labels)):
        np.savez(tmp_path / f"{name}.npz", image=grey.astype(np.uint8), label=y)
    out = ("--runs", tmp_path / "runs")

    def data(name: str) -> tuple[str, str]:
        return f"data.train=[{tmp_path / f'{name}.npz'}]", f"data.test=[{tmp_path / f'{name}.npz'}]"

    apart = holdfast("analyze", "arrays", "separation", *data("two"), "threat=linf:4/255", *out)
    assert apart.stdout.count("40; 40 within 2 eps") == 2
    other = holdfast("analyze", "arrays", "separation", *data("one"), *out)
    assert other.exit_code == 0, other.output
    assert other.stdout.splitlines()[-1] != apart.stdout.splitlines()[-1]
    neighbour = holdfast("analyze", "arrays", "nearest-neighbour", *data("two"), "threat=linf:3/255", *out)
    assert neighbour.exit_code == 0, neighbour.output
    everything = tmp_path / "all.csv"
    everything.write_text("part,index,reason\n" + "".join(f"train,{i},no\n" for i in range(40)))
    nothing = holdfast("analyze", "arrays", "separation", *data("two"), f"exclude={everything}", *out)
    assert nothing.exit_code == 2
    assert "leaves no training image" in nothing.output
    for key in ("train_size=10", "components=0:2"):
        ignored = holdfast("analyze", "digits", "separation", f"data.{key}", *out)
        assert ignored.exit_code == 2
        assert "has no effect" in ignored.output
    assert holdfast("analyze", "digits", "separation", "data=3", *out).exit_code == 2


def test_the_nearest_neighbour_classifier_of_a_data_set(tmp_path: Path) -> None:
    result = holdfast(
        *("analyze", "digits", "nearest-neighbour", "threat=linf:0.1", "examples=30", "train_size=400"),
        *("part=train", "--runs", tmp_path),
    )
    assert result.exit_code == 0, result.output
    folder = Path(result.stdout.splitlines()[-1])
    table = pd.read_csv(folder / "examples.csv")
    assert table["correct"].all()
    assert (table["certified"] <= table["found"]).all()
    assert (folder / "radii.png").exists()


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("digts", "separation"), "did you mean 'digits'"),
        (("digits", "separation", "threat=linf:x"), "given 'x'"),
        (("digits", "separation", "data.rot=3"), "unknown key 'rot'"),
        (("digits", "separation", "exclude=nowhere.csv"), "nowhere.csv"),
        (("digits", "landscape"), "is not a run folder"),
    ],
)
def test_what_cannot_be_analysed(arguments: tuple[str, ...], hint: str, tmp_path: Path) -> None:
    refused = holdfast("analyze", *arguments, "--runs", tmp_path / "runs")
    assert refused.exit_code == 2, refused.output
    assert hint in refused.output
    assert not (tmp_path / "runs").exists()
