"""Checkpoints: everything a training needs to go on as if it had never stopped."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from holdfast.files import write_bytes


class DamagedCheckpoint(ValueError):
    """A file that is no checkpoint any more."""


@dataclass(frozen=True)
class Checkpoint:
    """The state after an optimiser step."""

    model: dict[str, Any]
    optimizer: dict[str, Any]
    history: list[dict[str, Any]]
    """One record per finished epoch."""
    average: dict[str, Any] = field(default_factory=dict)
    """The running average of the weights, where one is kept."""
    best: dict[str, Any] = field(default_factory=dict)
    """The best validation so far and its weights, where they are kept."""
    step: int = 0
    """Batches trained on."""
    partial: dict[str, Any] = field(default_factory=dict)
    """Sums and seconds of an epoch that is not finished, and what observers saw of it; empty between epochs."""
    precision: dict[str, Any] = field(default_factory=dict)
    """What mixed precision remembers between steps."""
    stretches: list[dict[str, Any]] = field(default_factory=list)
    """One record for each start and resumption so far."""
    carried: dict[str, Any] = field(default_factory=dict)
    """What the objective carries from step to step: see ``holdfast.bounds.carried``."""

    def save(self, path: Path) -> None:
        """Write the file whole, or leave the previous one."""
        buffer = io.BytesIO()  # torch's own writer turns a full disk into a RuntimeError
        torch.save(asdict(self), buffer)
        write_bytes(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Checkpoint:
        """Read a file that ``save`` wrote; nothing in it is executed.

        Raises:
            DamagedCheckpoint: the file is damaged or is not a checkpoint.
        """
        try:
            found = cls(**torch.load(path, map_location=device, weights_only=True))
            if not (isinstance(found.model, dict) and isinstance(found.optimizer, dict)):
                raise TypeError("it holds no states")
            if not (isinstance(found.history, list) and all(isinstance(record, dict) for record in found.history)):
                raise TypeError("it holds no history")
            return found
        except FileNotFoundError:
            raise
        except Exception as fault:  # an unpickler fails on rubbish in any way
            reason = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
            text = f"the checkpoint {path} cannot be read ({reason}); delete it to start anew"
            raise DamagedCheckpoint(text) from fault
