"""Images projected on chosen principal components: which directions carry robust features?"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from holdfast.files import write_bytes


@dataclass(frozen=True)
class PrincipalComponents:
    """The directions of largest variance of a set of images, in descending order."""

    mean: Tensor
    """(D,)."""
    directions: Tensor
    """Orthonormal columns, (D, R) with R ≤ min(N, D); the sign of each is arbitrary."""
    singular_values: Tensor
    """Of the centred images, (R,), descending."""

    @classmethod
    def fit(cls, images: Tensor) -> PrincipalComponents:
        """The components of images (N, ...), un-augmented, centred on their mean, in float64.

        From the eigenvectors of the D × D scatter where there are more images than pixels, by a thin
        singular value decomposition otherwise.
        """
        rows = images.flatten(1).double()
        mean = rows.mean(0)
        centred = rows - mean
        if len(rows) > rows.shape[1]:
            variances, directions = torch.linalg.eigh(centred.T @ centred)
            values, directions = variances.clamp(min=0).sqrt().flip(0), directions.flip(1)
        else:
            _, values, transposed = torch.linalg.svd(centred, full_matrices=False)
            directions = transposed.T
        return cls(mean.float(), directions.float(), values.float())

    def project(self, images: Tensor, indices: list[int]) -> Tensor:
        """mean + Σ_i v_i v_iᵀ (x − mean) over the components of these indices; (N, ...).

        Raises:
            IndexError: there are not so many components.
        """
        available = self.directions.shape[1]
        if indices and (max(indices) >= available or min(indices) < 0):
            raise IndexError(
                f"component {max(indices)} was asked for, but there are {available}: the smaller of the number of "
                "training images and of pixels"
            )
        chosen = self.directions[:, indices].to(images.device)
        mean = self.mean.to(images.device)
        centred = images.flatten(1) - mean
        return (mean + centred @ chosen @ chosen.T).view_as(images)

    @classmethod
    def fit_cached(cls, images: Tensor, cache: Path | None = None) -> PrincipalComponents:
        """``fit``, kept on disk by a hash of the images: ``$HOLDFAST_CACHE``, or ``~/.cache/holdfast``."""
        content = repr((images.shape, images.dtype)).encode() + images.contiguous().numpy().tobytes()
        digest = hashlib.sha256(content).hexdigest()[:16]
        try:
            folder = cache or Path(os.environ.get("HOLDFAST_CACHE") or Path.home() / ".cache" / "holdfast")
        except RuntimeError:  # nobody has a home here
            return cls.fit(images)
        path = folder / f"principal-components-{digest}.safetensors"
        if path.is_file():
            try:
                return cls(**load_file(path))
            except (SafetensorError, TypeError):
                path.unlink()
        found = cls.fit(images)
        try:
            write_bytes(path, save({name: value.contiguous() for name, value in vars(found).items()}))
        except OSError:
            return found  # a cache that cannot be written is no reason to stop
        return found


def parse_indices(text: str) -> list[int]:
    """Indices from ranges: ``"0:16,512:3072"``; the end of a range is not included.

    Raises:
        ValueError: anything else, or an empty range.
    """
    indices: list[int] = []
    for part in text.replace(" ", "").split(","):
        first, separator, last = part.partition(":")
        if not first.isdigit() or (separator and not last.isdigit()):
            raise ValueError(f"expected ranges such as 0:16,512:3072, given {text!r}")
        stop = int(last) if separator else int(first) + 1
        if stop <= int(first):
            raise ValueError(f"the range {part!r} is empty")
        indices += range(int(first), stop)
    if len(set(indices)) < len(indices):
        raise ValueError(f"the ranges {text!r} overlap")
    return indices
