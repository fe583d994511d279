"""A device for tests on machines without a GPU: torch's PrivateUse1 backend, over host memory.

    host_device.install()                  # compiles host_device.cpp once (g++), then cached
    model.to("host"); x.to("host")         # refuses what CUDA refuses: operands on two devices, a CPU generator for
                                           # a draw on the device, numpy() of its tensors
    with host_device.watch() as seen: ...  # counts operators (about the kernels launched), copies, and the times
    print(seen.report())                   # that the host waits for the device, by the line of holdfast that asked

Every operator runs as its CPU kernel on an alias of the same memory, so the numbers are those of the CPU. What it
does not see: CUDA's kernels and their determinism, TF32, speed, memory, an operator that CUDA lacks.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import traceback
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import torch
from torch.utils.cpp_extension import include_paths

NAME, EXTENSION = "host", "holdfast_host_device"
FOLDER = Path(os.environ.get("HOLDFAST_HOST_DEVICE", Path(tempfile.gettempdir()) / f"holdfast-host-{os.getuid()}"))
"""Where it is compiled and kept."""
COUNTED: list[str] = []
"""What tests counted, for the end of their session."""
_extension: Any = None


def install() -> None:
    """Make the device known to torch; for good, in this process."""
    global _extension
    if _extension is not None:
        return
    torch.utils.rename_privateuse1_backend(NAME)
    specification: Any = importlib.util.spec_from_file_location(EXTENSION, _compiled())
    _extension = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(_extension)
    torch._register_device_module(NAME, _device_module())
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)


def _compiled() -> Path:
    """The library, compiled if it is not there; by one process at a time."""
    source = Path(__file__).with_suffix(".cpp")
    made_of = source.read_bytes() + f"{torch.__version__} {sys.version} {platform.machine()}".encode()
    library = FOLDER / f"{EXTENSION}-{hashlib.sha256(made_of).hexdigest()[:16]}.so"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(library.with_suffix(".lock")):
        if not library.exists():
            torch_lib = Path(torch.__file__).parent / "lib"
            folders = [*include_paths(), sysconfig.get_path("include")]
            abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
            named = [f"-DTORCH_EXTENSION_NAME={EXTENSION}", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]
            flags = [
                "-O0",
                "-w",
                "-std=c++20",
                "-fPIC",
                "-shared",
                *named,
                *(f"-isystem{each}" for each in folders),
            ]
            links = [f"-L{torch_lib}", "-ltorch", "-ltorch_cpu", "-lc10", "-ltorch_python"]
            unfinished = library.with_suffix(".part")
            subprocess.run(["g++", *flags, str(source), "-o", str(unfinished), *links], check=True)
            unfinished.rename(library)
    return library


def _device_module() -> types.ModuleType:
    """What torch asks of ``torch.<name>``."""
    module: Any = types.ModuleType(f"torch.{NAME}")
    generator = _extension.default_generator()
    module.is_available = module.is_initialized = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.set_device = module.synchronize = module.current_stream = lambda device=None: None
    module._is_in_bad_fork = lambda: False
    module.manual_seed = module.manual_seed_all = _extension.seed
    module.get_rng_state = lambda device=None: generator.get_state()
    module.set_rng_state = lambda state, device=None: generator.set_state(state)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16, torch.float32]
    module.device = lambda device=None: contextlib.nullcontext()
    module._get_device_index = lambda *args, **kwargs: 0
    return module


class Seen:
    """What was asked of the device."""

    def __init__(self) -> None:
        self.operators: dict[str, int] = {}
        self.waits = 0
        """Times that the host waited for the device."""
        self.where: Counter[tuple[str, str]] = Counter()
        """These by line of holdfast and operator."""

    @property
    def launches(self) -> int:
        """Operators, about as many as a GPU launches kernels."""
        return sum(self.operators.values())

    @property
    def uploads(self) -> int:
        """Copies from the host."""
        return self.operators.get("copy:host-device", 0)

    def count(self, name: str) -> int:
        """Operators of this name, whatever their overload."""
        return sum(count for each, count in self.operators.items() if each.split("::")[-1].split(".")[0] == name)

    def report(self, most: int = 12) -> str:
        """In words, with the lines that waited most."""
        lines = [f"{self.launches} operators, {self.uploads} copies from the host, {self.waits} waits"]
        lines += [f"  {count:5d}  {place}  {name}" for (place, name), count in self.where.most_common(most)]
        return "\n".join(lines)

    def note(self, name: str) -> None:
        frames = [frame for frame in traceback.extract_stack()[:-1] if "/holdfast/" in frame.filename]
        place = f"{frames[-1].filename.split('/holdfast/')[-1]}:{frames[-1].lineno}" if frames else "elsewhere"
        self.where[place, name.removeprefix("aten::")] += 1


@contextlib.contextmanager
def watch() -> Iterator[Seen]:
    """Counts all that the device is asked inside."""
    seen = Seen()
    _extension.start(seen.note)
    try:
        yield seen
    finally:
        seen.operators, seen.waits, _ = _extension.stop()
