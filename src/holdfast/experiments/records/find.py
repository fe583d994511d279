"""Which folders are runs, and which one a name means."""

from __future__ import annotations

from pathlib import Path

from holdfast.component import nearest
from holdfast.experiments.records.record import EVALUATIONS, recipe_file


def trainings(runs: Path) -> list[Path]:
    """Of a folder of runs every training, and every model that was evaluated without one, oldest first."""
    return _folders(runs, "*")


def evaluations(runs: Path) -> list[Path]:
    """Every evaluation below them that has a folder of its own, oldest first."""
    return _folders(runs, f"*/{EVALUATIONS}/*")


def find_folder(name: str | Path, runs: Path) -> Path:
    """The training or evaluation of this path, or of this name (or the beginning of one) in the folder of runs.

    Raises:
        FileNotFoundError: there is none, or several begin so.
    """
    if recipe_file(Path(name)):
        return Path(name)
    known = {path.name: path for path in [*evaluations(runs), *trainings(runs)]}
    matching = [folder for folder in known if folder.startswith(str(name))]
    if len(matching) == 1:
        return known[matching[0]]
    if matching:
        raise FileNotFoundError(f"{len(matching)} runs begin with {str(name)!r}: {', '.join(sorted(matching))}")
    hint = f"; {nearest(name, known)}" if known else ""
    raise FileNotFoundError(f"{str(name)!r} is not a run folder, nor the name of one in {runs}{hint}")


def _folders(runs: Path, pattern: str) -> list[Path]:
    files = [file for path in runs.glob(pattern) if (file := recipe_file(path))]
    return [file.parent for file in sorted(files, key=lambda file: file.stat().st_mtime)]
