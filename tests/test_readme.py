"""The README keeps its promises: its Python example runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_example_runs_on_a_foreign_module(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    summary = names["evaluation"].summary  # type: ignore[attr-defined]
    assert 0.5 < summary["certified"]["bounds"] <= summary["attacked"]["ladder"] <= summary["standard"]
    assert "bounds.radius" in capsys.readouterr().out


def test_what_it_names_exists() -> None:
    root = Path(__file__).parents[1]
    assert all((root / path).is_file() for path in re.findall(r"\]\(([\w./-]+)\)", README))
    rooms = re.findall(r"(\w+)/(?=[ ,])", README.split("## Where things are")[1].split("MIT")[0])
    assert {room for room in rooms if not (root / "src" / "holdfast" / room).is_dir()} == set()
