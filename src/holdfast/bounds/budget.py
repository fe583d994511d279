"""How much is held at a time: one budget for every temporary that grows with examples, neurons or classes."""

from __future__ import annotations

import torch
from torch import Tensor

PASS = 2**20
"""Coefficients of a backward pass on a CPU: what caches hold, beyond which a pass is no faster."""

SWEEP = 2**25
"""Entries of all values of a graph on a CPU; of each some ten numbers are kept."""


def of_pass(like: Tensor) -> int:
    """Coefficients of a value that one backward pass may hold, on the device of a tensor."""
    return PASS if like.device.type == "cpu" else _share(like)


def of_sweep(like: Tensor) -> int:
    """Entries that the values of all examples may have together."""
    return SWEEP if like.device.type == "cpu" else _share(like)


def _share(like: Tensor) -> int:
    """A 64th of the memory of a device, in numbers of this type."""
    if like.device.type != "cuda":
        return SWEEP
    total: int = torch.cuda.get_device_properties(like.device).total_memory
    return total // 64 // like.element_size()
