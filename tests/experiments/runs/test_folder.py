"""What a run's folder says of the code and the machine, and the bytes of its weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch
from helpers import TINY, linear_model
from safetensors.torch import load_file, save

from holdfast.experiments import Run, resolve
from holdfast.experiments.runs import folder
from holdfast.experiments.runs.folder import environment
from holdfast.files import write_bytes


def test_the_same_weights_are_the_same_bytes(tmp_path: Path) -> None:
    found = set()
    for _ in range(20):  # safetensors draws an order of its own each time
        Run(tmp_path).write_model(linear_model(10, (1, 8, 8)), (1, 8, 8), 10)
        found.add((tmp_path / "model.safetensors").read_bytes())
    assert len(found) == 1


def test_weights_of_earlier_runs_are_read(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.begin(resolve("digits", TINY).training_recipe(), {}, torch.device("cpu"))
    model = run.experiment.model.build((1, 8, 8), 10)
    run.write_model(model, (1, 8, 8), 10)
    new, state = run.model(), load_file(tmp_path / "model.safetensors")
    write_bytes(
        tmp_path / "model.safetensors", save(state, metadata={"input_shape": "[1, 8, 8]", "num_classes": "10"})
    )
    for name, value in run.model().state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
        assert torch.equal(value, new.state_dict()[name])


def test_the_environment_names_every_distribution_and_the_libraries_of_the_device() -> None:
    known = environment(torch.device("cpu"))
    assert known["packages"]["torch"] == torch.__version__
    for name in ("filelock", "pillow", "typer", "pyyaml"):
        assert known["packages"][name] == metadata.version(name)
    assert len(known["packages"]) >= 40
    assert known["cuda"] == torch.version.cuda
    assert known["cudnn"] == torch.backends.cudnn.version()
    json.dumps(known, allow_nan=False)


def test_a_commit_is_recorded_only_where_the_code_belongs_to_the_repository(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        identity = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org")
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    installed = tmp_path / ".venv" / "folder.py"
    own = tmp_path / "src" / "folder.py"
    for file in (installed, own):
        file.parent.mkdir()
        file.write_text("code")
    assert folder._commit(own) == {"git": None, "git_changed": False}
    git("init", "-q")
    git("add", "src")
    git("commit", "-q", "-m", "theirs")
    assert folder._commit(installed) == {"git": None, "git_changed": False}
    installed.unlink()
    assert folder._commit(own) == {"git": git("rev-parse", "HEAD"), "git_changed": False}
    own.write_text("changed")
    assert folder._commit(own)["git_changed"]


def test_the_environment_is_told_without_an_install() -> None:
    code = """
import sys, torch
from importlib import metadata
from holdfast.experiments.runs import folder
metadata.distributions = lambda: []  # what PYTHONPATH=src alone leaves of it
print(folder.environment(torch.device("cpu"))["packages"])
"""
    source = str(Path(folder.__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": source, "PATH": ""},  # nor is there git
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "{}\n"), done.stderr
