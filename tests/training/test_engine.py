"""The engine: several processes make the step that one makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import TINY
from typer.testing import CliRunner

from holdfast import train
from holdfast.cli import app
from holdfast.experiments import Run
from holdfast.experiments.records.record import read_record
from holdfast.training.engine import Engine

SCRIPT = '''
import sys
import torch
from torch import nn
from holdfast import Threat
from holdfast.data import ImageSet
from holdfast.objectives import AWP, IBP, TRADES, AdversarialTraining, SmoothAdv
from holdfast.training import SGD, Constant, Observer, Training, fit
from holdfast.training.engine import Engine

class Double(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    def forward(self, x):
        return self.network(x.double())

class Tail(Observer):
    """Sees which examples a process trains on."""
    seen = 0
    def observe(self, x, y, x_adv, progress):
        self.seen += len(x)
    def record(self):
        return {}

torch.manual_seed(0)
generator = torch.Generator().manual_seed(0)
images = torch.randint(0, 256, (71, 1, 8, 8), generator=generator).to(torch.uint8)
data = ImageSet(images, torch.randint(0, 4, (71,), generator=generator), tuple("abcd"))
objective = {
    "trades": TRADES(steps=2, reduction="unbalanced"),
    "adversarial": AdversarialTraining(steps=2),
    "smooth-adv": SmoothAdv(steps=1, ramp_end=1.0),
    "regularised": IBP(regularisation=0.5, ramp_end=1.0, tolerance=1.0),
    "awp": AWP(objective=AdversarialTraining(steps=1), gamma=0.1),
}[sys.argv[3]]
model, tail = Double(), Tail()
if sys.argv[3] == "regularised":  # bounds know no change of precision
    model = model.network.float()
engine = Engine(accelerator="cpu", devices=int(sys.argv[1])).start()
engine.launch()
# 71 images in batches of 14 leave a last batch of one, too small for two processes
training = Training(
    steps=20, batch_size=14, accumulate=int(sys.argv[4]), clip_gradient=0.5, averaging={"kind": "swa"}
)
settings = Threat("linf", 0.1), SGD(lr=0.1), Constant(), training, engine
history = fit(model, data, objective, *settings, seed=3, observers=[tail])
torch.save({"model": model.state_dict(), "loss": [r["loss"] for r in history], "seen": tail.seen},
           f"{sys.argv[2]}.{engine.leads}")
engine.wait()
'''


def environment() -> dict[str, str]:
    own = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    return own | {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("objective", "accumulate"),
    [("trades", 1), ("adversarial", 3), ("smooth-adv", 3), ("regularised", 1), ("awp", 1)],
)
@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(tmp_path: Path, objective: str, accumulate: int) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for devices in (1, 2):
        command = [sys.executable, script, str(devices), tmp_path / f"{devices}", objective, str(accumulate)]
        subprocess.run(command, env=environment(), check=True, timeout=120, capture_output=True)
    one, first, second = (torch.load(tmp_path / name) for name in ("1.True", "2.True", "2.False"))
    for key, value in one["model"].items():
        precision = 1e-12 if value.dtype == torch.float64 else 1e-5
        assert torch.allclose(first["model"][key], value, rtol=0, atol=precision)
        assert torch.equal(first["model"][key], second["model"][key])
    assert first["loss"] == pytest.approx(one["loss"], abs=1e-5)  # its sums are float32
    assert first["seen"] + second["seen"] == one["seen"]  # the ones of no weight are not shown
    assert abs(first["seen"] - second["seen"]) <= 20


@pytest.mark.slow
def test_two_processes_train_through_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "holdfast", "train", "digits", *TINY, "engine.accelerator=cpu"]
    command += ["objective={name: adversarial, steps: 2}", "analysis=[neural-collapse]", "--runs"]
    alone = subprocess.run(
        [*command, str(tmp_path / "one")], env=environment(), capture_output=True, text=True, timeout=240
    )
    # In a folder of its own: where it runs decides no name, and a finished training is not repeated.
    command += [str(tmp_path / "two"), "engine.devices=2"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.splitlines()[-1])
    result = Run(folder).result
    assert 0 <= result["certified"]["bounds"] <= result["attacked"]["pgd"] <= result["standard"] <= 1
    assert done.stdout.count("Standard") == 1
    assert done.stderr.count("epoch 1/2") == 1
    one, two = (Run(path).history for path in (Path(alone.stdout.splitlines()[-1]), folder))
    for name in ("clean_nc1", "adversarial_nc1", "adversarial_nc3"):  # of the images of both processes
        assert two[name].tolist() == pytest.approx(one[name].tolist(), rel=1e-3)
    again = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert again.stdout == done.stdout
    assert "finished already" in again.stderr


@pytest.mark.slow
def test_two_processes_keep_checkpoints_within_an_epoch_and_go_on_from_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        SCRIPT.replace("steps=20,", "steps=20, checkpoint_every=2,")
        .replace("observers=[tail])", "observers=[tail], resume=resume, save=save)")
        .replace(
            "history = fit",
            "from pathlib import Path\n"
            "from holdfast.training.checkpoint import Checkpoint\n"
            "kept = Path(f'{sys.argv[2]}.7.pt')\n"
            "resume = Checkpoint.load(kept, torch.device('cpu')) if sys.argv[2].endswith('again') else None\n"
            "def save(checkpoint):\n"
            "    checkpoint.save(Path(f'{sys.argv[2]}again.7.pt')) if checkpoint.step == 8 else None\n"
            "history = fit",
        )
    )
    for name in ("whole", "wholeagain"):
        command = [sys.executable, script, "2", tmp_path / name, "adversarial", "1"]
        done = subprocess.run(command, env=environment(), timeout=120, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    whole, again = (torch.load(tmp_path / f"{name}.True") for name in ("whole", "wholeagain"))
    assert all(torch.equal(again["model"][key], value) for key, value in whole["model"].items())
    assert again["seen"] < whole["seen"]


@pytest.mark.slow
def test_two_processes_estimate_the_statistics_of_averaged_weights_together(tmp_path: Path) -> None:
    """While the first alone validates and keeps the best."""
    script = tmp_path / "script.py"
    script.write_text(
        SCRIPT.replace(
            "model, tail = Double(), Tail()", "model, tail = nn.Sequential(nn.BatchNorm2d(1), Double()), Tail()"
        )
        .replace('averaging={"kind": "swa"}', 'averaging={"decay": 0.0}, watch="standard"')
        .replace("observers=[tail])", "observers=[tail], validate=validate if engine.leads else None)")
        .replace(
            "history = fit",
            "seen = []\n"
            "def validate(model):\n"
            "    seen.append(model[0].running_var.item())\n"
            "    return {'validation_standard': 0.1 * len(seen)}\n"
            "history = fit",
        )
    )
    for devices in (1, 2):
        command = [sys.executable, script, str(devices), tmp_path / f"{devices}", "adversarial", "1"]
        done = subprocess.run(command, env=environment(), timeout=120, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, first, second = (torch.load(tmp_path / name)["model"] for name in ("1.True", "2.True", "2.False"))
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert first["0.running_var"].item() == pytest.approx(one["0.running_var"].item(), rel=0.01)
    assert first["0.running_mean"].item() == pytest.approx(one["0.running_mean"].item(), rel=0.01)


CUT = """
import os, sys
from torch import nn
from holdfast import train
from holdfast.cli.console import ProgressLine
from holdfast.training.loop import _Fitting

def net(input_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, num_classes))

def cut(self, *arguments):
    if self.step == int(sys.argv[1]):
        self.engine.wait()
        os._exit(9)
    return train_step(self, *arguments)

if __name__ == "__main__":
    train_step, _Fitting.train_step = _Fitting.train_step, cut
    train("digits", *sys.argv[3:], runs=sys.argv[2], reporter=ProgressLine())
"""
"""Trains until so many batches are done, then dies."""


QUICK = (
    *TINY,
    "engine.accelerator=cpu",
    "objective=cross-entropy",
    "evaluation={examples: 20, attacks: [fgsm], train_examples: 0, lipschitz_examples: 0, curve_points: 0}",
)


def cut_off_and_gone_on_with(folder: Path, at: int, devices: tuple[int, ...], *settings: str) -> tuple[Run, str]:
    """A training on so many devices until a batch, and from there on others; the run and what the last one said."""
    script, said = folder / "cut.py", ""
    script.write_text(CUT)
    asked = [*QUICK, *settings]
    for number, count in enumerate(devices, start=1):
        stop = at if number < len(devices) else -1
        command = [sys.executable, script, str(stop), folder / "runs", *asked, f"engine.devices={count}"]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240, cwd=folder)
        assert done.returncode == (9 if stop > 0 else 0), done.stderr
        said = done.stderr
    (path,) = (folder / "runs").glob("*/recipe.yaml")
    return Run(path.parent), said


@pytest.mark.slow
def test_a_training_cut_off_on_two_devices_goes_on_with_one_and_says_what_that_changes(tmp_path: Path) -> None:
    run, said = cut_off_and_gone_on_with(tmp_path, 3, (2, 1), "model=cut:net")
    assert "goes on with 1 process where 2 trained so far" in said
    assert "warning: BatchNorm by process" in said
    assert run.finished
    assert run.history["epoch"].tolist() == [1, 2]
    assert "processes" not in run.history
    places = [{key: one[key] for key in ("stretch", "step", "processes", "accelerator")} for one in run.stretches]
    assert places == [
        {"stretch": 1, "step": 0, "processes": 2, "accelerator": "cpu"},
        {"stretch": 2, "step": 3, "processes": 1, "accelerator": "cpu"},
    ]
    assert json.loads((run.path / "environment.json").read_text())["stretches"] == run.stretches
    note = "trained by 2 then 1 processes: BatchNorm by process"
    for command in ("table", "runs"):
        shown = CliRunner().invoke(app, [command, "--runs", str(tmp_path / "runs")])
        assert note in shown.stdout
    assert run.note == read_record(run.path).values["note"] == note
    assert read_record(run.path).values["last.epoch"] == 2


@pytest.mark.slow
def test_another_number_of_devices_within_an_epoch_changes_nothing_but_rounding(tmp_path: Path) -> None:
    settings = "training.checkpoint_every=2", "optimizer={name: sgd, lr: 0.1}"
    whole = train("digits", *QUICK, *settings, runs=tmp_path / "whole")
    parts, said = cut_off_and_gone_on_with(tmp_path, 2, (1, 2), *settings)
    assert "goes on with 2 processes where 1 trained so far" in said
    assert "by process" not in said
    assert [(one["step"], one["processes"]) for one in parts.stretches] == [(0, 1), (2, 2)]
    assert parts.note == whole.note == ""
    assert parts.history["loss"].tolist() == pytest.approx(whole.history["loss"].tolist(), abs=1e-5)
    for ours, theirs in zip(parts.model().parameters(), whole.model().parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"WORLD_SIZE": "2"}, "2 processes were started together, but engine.devices=1"),
        ({"NODE_RANK": "1"}, "False"),
        ({"NODE_RANK": "0"}, "True"),
    ],
)
def test_processes_know_their_place(own: dict[str, str], words: str) -> None:
    code = "from holdfast.training.engine import Engine; print(Engine(accelerator='cpu', nodes={}).{})"
    code = code.format(1, "start()") if "WORLD_SIZE" in own else code.format(2, "leads")
    done = subprocess.run([sys.executable, "-c", code], env=environment() | own, capture_output=True, text=True)
    assert words in done.stdout + done.stderr


def test_what_cannot_be_started_again_is_refused(tmp_path: Path) -> None:
    code = "from holdfast.training.engine import Engine; Engine(accelerator='cpu', devices=2).start()"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert "ValueError: several processes start a program again" in done.stderr


def test_what_is_not_there_is_named() -> None:
    if torch.cuda.is_available():
        with pytest.raises(ValueError, match="devices=99"):
            Engine(accelerator="gpu", devices=99).start()
    else:
        with pytest.raises(ValueError, match=r"engine\.accelerator=gpu with devices=1"):
            Engine(accelerator="gpu").start()
