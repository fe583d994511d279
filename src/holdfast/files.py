"""Files written whole: under a temporary name first, so that a half-written file is never read."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it becomes ``path`` in one rename, or vanishes if the writing fails.

    The temporary name keeps the suffix, since many writers choose their format by it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


CLAIM = ".claim"


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Held while somebody works in a folder, which is made; whoever dies lets go.

    Raises:
        BlockingIOError: another process works in it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CLAIM
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as fault:
                raise BlockingIOError(fault.errno, "another process works on it", str(folder)) from fault
            if not path.exists() or os.fstat(file.fileno()).st_ino != path.stat().st_ino:
                continue  # whoever held it has removed the file since it was opened
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def sweep(folder: Path) -> None:
    """Remove the temporary files that killed writers left in a folder and below it."""
    for path in folder.rglob(".*"):
        writer = path.stem.rpartition(".")[2]
        if path.is_file() and writer.isdigit() and not _runs(int(writer)):
            path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def write_bytes(path: Path, content: bytes) -> None:
    """The bytes as a whole file."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """The text as a whole file."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """The value as indented JSON, in a whole file; NaN and inf are refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
