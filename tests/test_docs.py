"""The documentation keeps its promises: its pages are up to date and every command in them runs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from typer.testing import CliRunner, Result

from holdfast.cli import app
from holdfast.experiments.studies import study
from holdfast.experiments.studies.study import Study, plan_study, study_names
from holdfast.experiments.sweeps.sweep import Planned

DOCS = Path(__file__).parents[1] / "docs"
TINY = (
    "training.epochs=1",
    "training.presentations=null",
    "training.batch_size=60",
    "training.validation_examples=20",
    "evaluation.examples=20",
    "evaluation.attacks=[{name: pgd, steps: 2}]",
    "evaluation.train_examples=5",
    "evaluation.lipschitz_examples=5",
    "evaluation.curve_points=1",
    "evaluation.curve_examples=20",
)


def holdfast(command: str, *more: str) -> Result:
    result = CliRunner().invoke(app, [*shlex.split(command.removeprefix("holdfast")), *more])
    assert result.exit_code == 0, (command, more, result.output, result.exception)
    return result


def commands(text: str) -> list[str]:
    return re.findall(r"^    (holdfast .*)$", text, re.MULTILINE)


@pytest.fixture
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_build", DOCS / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_what_the_code_says(build: ModuleType) -> None:
    for path, text in build.pages().items():
        assert path.read_text("utf-8") == text, f"{path.name} is out of date: python docs/build.py"
    written = {path.stem for path in (DOCS / "studies").glob("*.md")}
    assert written == {*study_names(), "README"}


@pytest.mark.parametrize("name", study_names())
@pytest.mark.slow
def test_the_commands_of_a_study(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That on the digits is carried out, shorter still and by a few of its runs; the others show their plan."""

    def thinned(chosen: Study, **settings: object) -> tuple[list[Planned], list[str]]:
        if not settings["digits"]:
            return plan_study(chosen, **settings)  # type: ignore[arg-type]
        found: list[Planned] = []
        for one in chosen.sweeps:
            part = chosen.model_copy(update={"sweeps": [one]})
            few = () if "data.train_size" in one.over else ("data.train_size=100",)
            runs, _ = plan_study(part, **{**settings, "overrides": (*TINY, *few)})  # type: ignore[arg-type]
            found += runs[:: max(1, len(runs) - 1)] if len(chosen.sweeps) == 1 else runs[:1]
        return found, []

    monkeypatch.setattr(study, "plan_study", thinned)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HOLDFAST_DATA", str(tmp_path / "nowhere"))
    page = (DOCS / "studies" / f"{name}.md").read_text("utf-8")
    chosen = study.read_study(name)
    runs = tmp_path / "runs"
    for command in commands(page):
        if "--data digits" not in command:
            if chosen.sweeps and "--dry-run" not in command:
                command += " --dry-run"
            if chosen.sweeps:
                assert " runs" in holdfast(command, "--runs", str(runs)).output
            continue
        result = holdfast(command, "--runs", str(runs), *(["--workers", "0"] if chosen.sweeps else []))
        folder = Path(result.stdout.splitlines()[-1])
        assert {"table.csv", "table.tex"} <= {path.name for path in folder.iterdir()}
        figures = [Path(line) for line in result.stdout.splitlines() if line.endswith(".png")]
        assert len(figures) >= len(chosen.views)
        for figure in figures:
            assert all(figure.with_suffix(suffix).stat().st_size for suffix in (".png", ".pdf", ".svg", ".csv"))
        assert chosen.staircase or "published" not in (folder / "table.csv").read_text()  # of other data


FORKS = """
import gc, json, os, sys
import holdfast.experiments.runs.training, holdfast.experiments.catalogue, holdfast.plots.results
from holdfast.cli import main
for arguments in json.load(sys.stdin):
    gc.freeze()
    if (child := os.fork()) == 0:
        sys.argv, code = ["holdfast", *arguments], 0
        try:
            main()
        except SystemExit as done:
            code = done.code or 0
        sys.stdout.flush()
        os._exit(code)
    if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        sys.exit(f"holdfast {' '.join(arguments)}: exit code {code}")
"""
"""Commands one after another as the installed one would run them: with a search path that lacks the current folder
(-P). What takes longest, importing torch, is done once."""


class Desk:
    """An empty folder and an empty home, where nothing but the installed command is known."""

    def __init__(self, folder: Path) -> None:
        self.folder, home = folder / "empty", folder / "home"
        self.folder.mkdir()
        home.mkdir()
        self.environment = {**os.environ, "HOME": str(home), "HF_HUB_OFFLINE": "1"}

    def write(self, page: str) -> None:
        """The files of a page: blocks that begin with their name."""
        for name, text in re.findall(r"```\w+\n# (\w+\.\w+)\n(.*?)```", page, re.DOTALL):
            (self.folder / name).write_text(text)

    def run(self, arguments: list[str], given: str = "") -> str:
        done = subprocess.run(
            arguments,
            cwd=self.folder,
            env=self.environment,
            input=given,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (arguments, done.stdout[-2000:], done.stderr[-3000:])
        return done.stdout

    def installed(self, command: str, *more: str) -> str:
        """By the console script itself."""
        program = Path(sys.executable).with_name("holdfast")
        return self.run([str(program), *shlex.split(command)[1:], *more])

    def several(self, commands: list[list[str]]) -> str:
        return self.run([sys.executable, "-P", "-c", FORKS], json.dumps([one[1:] for one in commands]))


@pytest.mark.slow
def test_the_tutorial(tmp_path: Path) -> None:
    desk, text = Desk(tmp_path), (DOCS / "tutorial.md").read_text("utf-8")
    desk.write(text)
    for number, block in enumerate(re.findall(r"```python\n(?!# \w+\.py)(.*?)```", text, re.DOTALL)):
        (desk.folder / f"block{number}.py").write_text(block)
        desk.run([sys.executable, f"block{number}.py"])
    short = ["data.train_size=100", *(one for one in TINY if not one.startswith("training"))]
    chosen = []
    for command in commands(text):
        command = re.sub(
            r"training\.epochs=(30|10)", lambda match: f"training.epochs={int(match[1]) // 10}", command
        )
        more = [*short, "--workers", "0"] if command.startswith(("holdfast sweep", "holdfast study mnist")) else []
        chosen.append([*shlex.split(command.replace("--workers 2", "")), *more])
    desk.several(chosen)
    made = {path.name for path in (desk.folder / "figures").iterdir()}
    assert made >= {"sandwich.png", "bars.svg", "table.tex"}


@pytest.mark.slow
def test_your_own_by_name(tmp_path: Path) -> None:
    desk, text = Desk(tmp_path), (DOCS / "extending.md").read_text("utf-8")
    desk.write(text)
    first, *rest = commands(text)
    assert "temperature" in desk.installed(first)  # the console script finds the file beside you
    small = [one for one in TINY if not one.startswith(("training.p", "training.v", "evaluation.attacks"))]
    chosen = [[*shlex.split(one), *small] for one in rest if "holdfast evaluate" not in one]
    chosen += [[*shlex.split(one), *small[2:]] for one in rest if "holdfast evaluate" in one]
    desk.several(chosen)
    recipes = [yaml.safe_load(path.read_text()) for path in (desk.folder / "runs").rglob("recipe.yaml")]
    assert {"ownloss:Warm", "ibp"} <= {one["objective"]["name"] for one in recipes if "objective" in one}
    asked = [one["evaluation"].get("certifiers", []) for one in recipes if "evaluation" in one]
    assert ["ownproof:Crown"] in [[certifier["name"] for certifier in certifiers] for certifiers in asked]


def test_the_example_of_a_false_certificate(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "guarantees.md").read_text("utf-8"), re.DOTALL)
    (tmp_path / "example.py").write_text(code)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run([sys.executable, "example.py"], cwd=tmp_path, env=environment, check=True)


def test_links_lead_somewhere() -> None:
    for path in [*DOCS.glob("*.md"), *(DOCS / "studies").glob("*.md")]:
        for link in re.findall(r"\]\(([\w./-]+)\)", path.read_text("utf-8")):
            assert (path.parent / link).exists(), f"{path.name}: {link}"


def test_the_sweeps_and_studies_of_the_readme_make_a_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HOLDFAST_DATA", str(tmp_path / "nowhere"))
    text = (DOCS.parent / "README.md").read_text("utf-8")
    found = [one.split("  #")[0] for one in commands(text) if one.startswith(("holdfast sweep", "holdfast study"))]
    assert len(found) == 4
    for command in found:
        assert " runs" in holdfast(command, "--dry-run", "--runs", str(tmp_path)).stdout
