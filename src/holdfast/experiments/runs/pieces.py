"""What the stages of an unfinished evaluation found, in files of its run folder."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from holdfast.attacks import AttackResult
from holdfast.certify import Certificate
from holdfast.files import whole_file

KINDS: Mapping[str, type[AttackResult] | type[Certificate]] = {"attack": AttackResult, "certificate": Certificate}
WORDS = {"origin": object, "status": list, "method": list, "guarantee": str, "arithmetic": str}
"""Fields that are text, and what of."""


@dataclass(frozen=True)
class Pieces:
    """A ``Store``: one file for each piece."""

    folder: Path

    def kept(self, stage: str) -> list[tuple[Tensor, Any]]:
        found = [_read(path) for path in sorted(self.folder.glob(f"{stage}-*.npz"))]
        return [piece for piece in found if piece is not None]

    def put(self, stage: str, rows: Tensor, found: AttackResult | Certificate) -> None:
        (kind,) = (name for name, one in KINDS.items() if isinstance(found, one))
        values = {f.name: getattr(found, f.name) for f in fields(found)}
        arrays: dict[str, Any] = {name: _array(value) for name, value in values.items() if value is not None}
        # Nobody asks a stage about an example twice.
        with whole_file(self.folder / f"{stage}-{int(rows[0]):07d}.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, rows=rows.numpy(), kind=kind, **arrays)

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value, dtype=str)


def _read(path: Path) -> tuple[Tensor, Any] | None:
    """A piece, or None where the file is damaged, so that the piece is made anew."""
    try:
        with np.load(path, allow_pickle=False) as file:
            values = {name: file[name] for name in file.files}
        kind = KINDS[str(values.pop("kind"))]
        rows = torch.from_numpy(values.pop("rows"))
        return rows, kind(**{name: _value(name, value) for name, value in values.items()})
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None


def _value(name: str, array: np.ndarray) -> Any:
    kind = WORDS.get(name)
    if kind is None:
        return torch.from_numpy(array)
    return array.astype(object) if kind is object else array.tolist() if kind is list else str(array)
