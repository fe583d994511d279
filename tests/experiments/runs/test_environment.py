"""What a run's folder says of the code and the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from holdfast.experiments.runs import environment as module
from holdfast.experiments.runs.environment import environment


def test_the_environment_names_every_distribution_and_the_libraries_of_the_device() -> None:
    known = environment(torch.device("cpu"))
    assert torch.__version__.startswith(known["packages"]["torch"])  # +cpu, +cu130
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

    installed = tmp_path / ".venv" / "code.py"
    own = tmp_path / "src" / "code.py"
    for file in (installed, own):
        file.parent.mkdir()
        file.write_text("code")
    assert module._commit(own) == {"git": None, "git_changed": False}
    git("init", "-q")
    git("add", "src")
    git("commit", "-q", "-m", "theirs")
    assert module._commit(installed) == {"git": None, "git_changed": False}
    installed.unlink()
    assert module._commit(own) == {"git": git("rev-parse", "HEAD"), "git_changed": False}
    own.write_text("changed")
    assert module._commit(own)["git_changed"]


def test_the_environment_is_told_without_an_install() -> None:
    code = """
import sys, torch
from importlib import metadata
from holdfast.experiments.runs.environment import environment
metadata.distributions = lambda: []  # what PYTHONPATH=src alone leaves of it
print(environment(torch.device("cpu"))["packages"])
"""
    source = str(Path(module.__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": source, "PATH": ""},  # nor is there git
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "{}\n"), done.stderr
