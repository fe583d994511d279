"""What a result belongs to, beside its recipe: the packages, the device, and the state of the code."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from holdfast.training.stretches import device_name


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device and state of the code that a result belongs to."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": installed(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "device": {"type": device.type, "name": device_name(device), "threads": torch.get_num_threads()},
        "cpus": os.cpu_count(),
        **_commit(Path(__file__)),
    }


def installed() -> dict[str, str]:
    """Every installed distribution by its name, and its version; of several of one name the first on the path."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():  # in the order of the search path
        name, version = distribution.metadata["Name"], distribution.version
        if name and version:  # neither where a folder of metadata is damaged
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), version)
    return dict(sorted(found.items()))


def _commit(file: Path) -> dict[str, Any]:
    """The commit of the checkout that the code runs from, and whether it was changed.

    None where the code is installed: the repository that a virtual environment lies in is another's.
    """
    ours = _git(file.parent, "ls-files", "--error-unmatch", file.name) is not None
    return {
        "git": _git(file.parent, "rev-parse", "HEAD") if ours else None,
        "git_changed": ours and bool(_git(file.parent, "status", "--porcelain")),
    }


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says in a folder; None where it says no."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
