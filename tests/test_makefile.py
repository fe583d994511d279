"""The environment that make finds may be of uv, which puts no pip into it, or of an old Python."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = """#!/bin/sh
echo "$@" >> {log}
case "$*" in
  -c*) exit {old} ;;
  "-m pip --version") test -e {log}.pip ;;
  "-m ensurepip") test {cannot} = 0 && touch {log}.pip ;;
esac
"""


@pytest.mark.parametrize(
    ("old", "cannot", "said"),
    [(0, 0, ""), (1, 0, "is of an older Python than 3.11"), (0, 1, "has no pip, and its Python cannot install it")],
)
def test_make_uses_the_environment_or_says_why_not(old: int, cannot: int, said: str, tmp_path: Path) -> None:
    log, python = tmp_path / "log", tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(PYTHON.format(log=log, old=old, cannot=cannot))
    python.chmod(0o755)
    command = ["make", "--no-print-directory", f"VENV={tmp_path}", f"{tmp_path}/.installed"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (said == "")
    assert said in done.stdout
    installed = "-m pip install -c constraints.txt -e ." in log.read_text().splitlines()
    assert installed == (tmp_path / ".installed").exists() == (said == "")
