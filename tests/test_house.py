"""The house stands: imports go down only, from room to room, and inside a room in no circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import holdfast

ROOT = Path(holdfast.__file__).parent
ORDER = [
    "__main__",
    "cli",
    "report",
    "__init__",
    "experiments",
    "plots",
    "evaluation",
    "training",
    "listeners",
    "objectives",
    "certify",
    "attacks",
    "analysis",
    "bounds",
    "formats",
    "models",
    "layers",
    "data",
    "search",
    "fold",
    "inference",
    "doors",
    "arithmetic",
    "threat",
    "component",
    "foreign",
    "norms",
    "draws",
    "files",
    "memory",
    "numbers",
]
"""From the attic to the cellar; ``__init__`` is what ``import holdfast`` offers."""
MODULES = {
    ".".join(("holdfast", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


def imported(path: Path) -> Iterator[str]:
    """The modules of ours that a file imports, those inside functions and for type checkers alone included."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{path}: a relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name if name in MODULES else node.module for name in inner]
        else:
            continue
        yield from (name for name in found if name in MODULES)


def room(module: str) -> str:
    return [*module.split("."), "__init__"][1]


def test_every_room_has_its_place() -> None:
    assert {room(module) for module in MODULES} <= set(ORDER)


def test_imports_go_down_only() -> None:
    upward = [
        f"{module} imports {name}"
        for module, path in MODULES.items()
        for name in imported(path)
        if ORDER.index(room(name)) < ORDER.index(room(module))
    ]
    assert not upward


def test_no_modules_import_each_other_in_a_circle() -> None:
    TopologicalSorter({module: {*imported(path)} - {module} for module, path in MODULES.items()}).prepare()


def test_listeners_need_no_torch() -> None:
    code = "import sys, holdfast.listeners; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
