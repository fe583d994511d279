"""Files written whole: under a temporary name first, so that a half-written file is never read."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import sys
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
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CLAIM
    lock = FileLock(path, timeout=0, preserve_lock_file=True)
    while not lock.is_locked:
        try:
            lock.acquire()
        except Timeout:
            if path.exists():  # otherwise whoever held it has removed the file since it was opened
                raise BlockingIOError(errno.EAGAIN, "another process works on it", str(folder)) from None
    try:
        yield
    finally:
        with contextlib.suppress(PermissionError):  # Windows removes no open file
            path.unlink(missing_ok=True)
        lock.release()
        if sys.platform == "win32":
            with contextlib.suppress(OSError):  # somebody else holds it by now
                path.unlink()


def is_claimed(folder: Path) -> bool:
    """Whether somebody works in a folder."""
    if not (folder / CLAIM).exists():
        return False
    try:
        with claimed(folder):
            return False
    except BlockingIOError:
        return True


def empty(folder: Path) -> None:
    """Remove all that is in a folder but the claim on it."""
    for path in folder.iterdir() if folder.exists() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != CLAIM:
            path.unlink()


def remove(folder: Path) -> None:
    """Remove a folder and all that is in it.

    Raises:
        BlockingIOError: another process works in it.
    """
    with claimed(folder):
        empty(folder)
    with contextlib.suppress(OSError):  # somebody has begun anew in it
        folder.rmdir()


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed writers left in a folder and below it."""
    for path in folder.rglob(".*"):
        writer = path.stem.rpartition(".")[2]
        if path.is_file() and writer.isdigit() and not _runs(int(writer)):
            path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    if sys.platform == "win32":  # where os.kill(process, 0) would send it a Ctrl-C
        return _runs_on_windows(process)
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _runs_on_windows(process: int) -> bool:
    windows: Any = vars(ctypes)["windll"].kernel32
    query, denied, still_active = 0x1000, 5, 259
    handle = windows.OpenProcess(query, False, process)
    if not handle:
        return bool(windows.GetLastError() == denied)  # somebody else's
    code = ctypes.c_ulong()
    windows.GetExitCodeProcess(handle, ctypes.byref(code))
    windows.CloseHandle(handle)
    return code.value == still_active


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
