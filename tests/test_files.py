"""Files are written whole or not at all."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from holdfast import files
from holdfast.files import CLAIM, claimed, remove, remove_leftovers, whole_file, write_json, write_text


def test_a_failed_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "old")

    def fail() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("half")
            assert temporary.suffix == ".txt"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": 1\n}\n'
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "b.json", float("nan"))
    assert not (tmp_path / "b.json").exists()


def test_what_a_killed_writer_left_is_swept_and_a_living_one_s_is_not(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    below = tmp_path / "checkpoint"
    below.mkdir()
    stale, fresh, other = (
        below / f".last.{gone.pid}.pt",
        tmp_path / f".history.{os.getpid()}.jsonl",
        tmp_path / ".gitignore",
    )
    for path in (stale, fresh, other):
        path.write_text("half")
    remove_leftovers(tmp_path)
    assert [path.exists() for path in (stale, fresh, other)] == [False, True, True]


def test_a_claim_keeps_others_out_and_leaves_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with claimed(folder):
        (folder / "file").write_text("work")
        with pytest.raises(BlockingIOError, match="another process works on it") as caught, claimed(folder):
            pass
        assert caught.value.filename == str(folder)
        with pytest.raises(BlockingIOError):
            remove(folder)
    assert [path.name for path in folder.iterdir()] == ["file"]
    with claimed(folder):
        pass
    remove(folder)
    assert not folder.exists()


HOLDING = """
import sys, time
from pathlib import Path
from holdfast.files import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_whoever_is_killed_lets_go(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDING, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(BlockingIOError), claimed(tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert (tmp_path / CLAIM).exists()
    with claimed(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


WORKING = """
import sys, time
from pathlib import Path
from holdfast.files import claimed
folder, done = Path(sys.argv[1]), 0
while done < 100:
    try:
        with claimed(folder):
            (folder / "inside").touch(exist_ok=False)  # fails if somebody else is inside
            (folder / "inside").unlink()
        done += 1
    except BlockingIOError:
        pass
"""


def test_of_many_who_take_turns_no_two_are_inside(tmp_path: Path) -> None:
    # Each removes the file of the claim as it leaves, which another may have opened already.
    command = [sys.executable, "-c", WORKING, str(tmp_path)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("handle", "error", "code", "runs"), [(7, 0, 259, True), (7, 0, 0, False), (0, 87, 0, False), (0, 5, 0, True)]
)
def test_on_windows_nobody_is_signalled_to_learn_whether_they_run(
    handle: int, error: int, code: int, runs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exit_code(handle: int, place: object) -> None:
        place._obj.value = code  # type: ignore[attr-defined]

    def kill(process: int, number: int) -> None:
        raise AssertionError("that is a Ctrl-C on Windows")

    kernel = SimpleNamespace(
        OpenProcess=lambda access, inherit, process: handle,
        GetLastError=lambda: error,
        GetExitCodeProcess=exit_code,
        CloseHandle=lambda handle: None,
    )
    half = tmp_path / ".last.12345.pt"
    half.write_text("half")
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
    monkeypatch.setattr(files.os, "kill", kill)
    monkeypatch.setattr(files.sys, "platform", "win32")
    remove_leftovers(tmp_path)
    assert half.exists() == runs
