"""The first minutes on a GPU: is it right, how fast is it, which rows of the tables does it give.

    python benchmarks/gpu/run.py OUT [--minutes 15] [--device cuda] [--tiny]
    python benchmarks/gpu/run.py --bundle FILE.tar.gz     # the code, and with HOLDFAST_DATA the data, for a machine
                                                          # without network
    python benchmarks/gpu/read.py OUT                     # what came back, as rows of Markdown

Every part writes OUT/PART.json as soon as it is done and is left out where that is there, so that a cut costs only
what is unfinished; no part begins that may not end within the minutes. `--tiny` tries all of it in a minute on a
CPU; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import tarfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import parts
import torch

ROOT = Path(__file__).parents[2]
CARRIED = ("src", "benchmarks", "pyproject.toml", "README.md", "LICENSE", "constraints.txt")
MOST_MIB = 64
"""Of a bundle."""


def card(device: str) -> dict[str, Any]:
    """What it ran on."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda}


def measure(out: Path, setting: parts.Setting, minutes: float) -> None:
    """Every part that is not there yet, while there is time."""
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    for name, (part, seconds) in parts.PARTS.items():
        file = out / f"{name}.json"
        left = 60 * minutes - (time.monotonic() - started)
        if file.exists():
            continue
        if not setting.tiny and seconds > left:
            print(f"{name}: {seconds} s are not left", flush=True)
            continue
        write(file, name, part, setting, left)


def write(
    file: Path, name: str, part: Callable[[parts.Setting, float], Any], setting: parts.Setting, left: float
) -> None:
    began = time.monotonic()
    try:
        found = {"result": part(setting, left)}
    except Exception as fault:  # the other parts are to be measured all the same
        found = {"error": "".join(traceback.format_exception(fault))}
        file = file.with_suffix(".failed")
    found |= {"part": name, "seconds": time.monotonic() - began, "tiny": setting.tiny, **card(setting.device)}
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps(found, indent=1))
    unfinished.rename(file)
    print(f"{name}: {'failed' if 'error' in found else 'done'} in {found['seconds']:.1f} s", flush=True)


def bundle(file: Path, most: int = MOST_MIB) -> None:
    """Pack what is needed there.

    Raises:
        SystemExit: it is larger than it may be; nothing is left.
    """
    folders = [ROOT / name for name in CARRIED]
    if data := os.environ.get("HOLDFAST_DATA"):
        folders += [Path(data) / "mnist"]
    with tarfile.open(file, "w:gz") as archive:
        for folder in folders:
            if folder.exists():
                name = folder.relative_to(ROOT) if ROOT in folder.parents else Path("data", folder.name)
                archive.add(folder, str(name), filter=lambda each: None if "__pycache__" in each.name else each)
    if (size := file.stat().st_size / 2**20) > most:
        file.unlink()
        raise SystemExit(f"the bundle is of {size:.0f} MiB, and may have {most}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--mib", type=int, default=MOST_MIB)
    given = parser.parse_args(arguments)
    if given.bundle:
        bundle(given.bundle, given.mib)
    elif given.out:
        measure(given.out, parts.Setting(given.device, given.tiny), given.minutes)
    else:
        parser.error("where shall the results go? Give OUT, or --bundle FILE")


if __name__ == "__main__":
    main()
