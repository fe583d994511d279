"""The script for the first minutes on a GPU: all of it runs on a CPU, goes on where it was cut, can be carried."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"
PARTS = ["fast-attack", "fast-smoothing", "fast-training", "right-answers", "right-waits", "row-bcp-mnist"]


def script(name: str, *arguments: object, data: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HOLDFAST_DATA": str(data)} if data else {**os.environ, "HOLDFAST_DATA": ""}
    command = [sys.executable, str(FOLDER / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
def test_every_part_writes_its_result_and_is_read_as_rows(tmp_path: Path) -> None:
    kept = {"part": "right-answers", "result": {"ibp": {"largest error": 1.5}}, "tiny": True, "seconds": 1.0}
    (tmp_path / "right-answers.json").write_text(json.dumps(kept | {"device": "a card", "torch": "2"}))
    done = script("run.py", tmp_path, "--tiny", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert sorted(file.stem for file in tmp_path.iterdir()) == PARTS
    assert "right-answers" not in done.stdout  # it was there
    assert all(file.suffix == ".json" for file in tmp_path.iterdir()), done.stdout
    read = script("read.py", tmp_path)
    assert read.stdout.count("a trial whose numbers mean nothing") == len(PARTS)
    assert "| ibp | 1.5 |" in read.stdout
    (tmp_path / "row-bcp-mnist.json").unlink()
    late = script("run.py", tmp_path, "--minutes", 0.001, "--device", "cpu")
    assert late.stdout == "row-bcp-mnist: 120 s are not left\n"


def test_a_bundle_holds_the_code_and_the_data_within_its_limit(tmp_path: Path) -> None:
    (tmp_path / "data" / "mnist").mkdir(parents=True)
    (tmp_path / "data" / "mnist" / "train.parquet").write_bytes(os.urandom(3 * 2**20))
    file = tmp_path / "bundle.tar.gz"
    assert script("run.py", "--bundle", file, data=tmp_path / "data").returncode == 0
    with tarfile.open(file) as archive:
        names = archive.getnames()
    assert {"src/holdfast/training/loop.py", "benchmarks/gpu/parts.py", "data/mnist/train.parquet"} <= set(names)
    assert not any("__pycache__" in name for name in names)
    large = script("run.py", "--bundle", file, "--mib", 2, data=tmp_path / "data")
    assert large.returncode == 1
    assert "may have 2" in large.stderr
    assert not file.exists()
