"""The documentation keeps its promises: its pages are up to date and every command in them runs."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
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


def test_the_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    text = (DOCS / "tutorial.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "mymodel.py").write_text(blocks[0])
    for block in blocks[1:]:
        exec(block, {})
    short = ["data.train_size=100", *(one for one in TINY if not one.startswith("training"))]
    for command in commands(text):
        more = short if command.startswith(("holdfast sweep", "holdfast study mnist-bcp")) else []
        command = re.sub(
            r"training\.epochs=(30|10)", lambda match: f"training.epochs={int(match[1]) // 10}", command
        )
        holdfast(command.replace("--workers 2", "--workers 0"), *more)
    assert {path.name for path in (tmp_path / "figures").iterdir()} >= {"sandwich.png", "bars.svg", "table.tex"}
    sys.modules.pop("mymodel")


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
