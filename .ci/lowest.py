"""Prints the lowest version of every dependency that pyproject.toml allows, as pip's constraints; torch apart."""

from __future__ import annotations

import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
for requirement in project["dependencies"]:
    name, separator, version = requirement.partition(">=")
    if not separator:
        raise SystemExit(f"{requirement!r} in pyproject.toml promises no lowest version")
    if name != "torch":
        print(f"{name}=={version}")
