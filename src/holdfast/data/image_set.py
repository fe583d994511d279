"""ImageSet: labelled images as one uint8 tensor, and the splits of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageSet:
    """Labelled images, whole, on one device."""

    images: Tensor
    """(N, C, H, W), uint8 in 0..255; float32 where they were projected and left that grid."""
    labels: Tensor
    """(N,) int64 in 0..K−1."""
    classes: tuple[str, ...]
    """The K names."""

    def __post_init__(self) -> None:
        if self.images.dim() != 4 or self.images.dtype not in (torch.uint8, torch.float32):
            raise ValueError(
                "expected uint8 or float32 images (N, C, H, W), "
                f"given {tuple(self.images.shape)} of {self.images.dtype}"
            )
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != torch.int64:
            raise ValueError(
                f"expected {len(self.images)} int64 labels, given {tuple(self.labels.shape)} of {self.labels.dtype}"
            )
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            given = f"{self.labels.min()} to {self.labels.max()}"
            raise ValueError(f"labels run from {given}, but there are {len(self.classes)} classes")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def batch(self, indices: Sequence[int] | Tensor | slice) -> tuple[Tensor, Tensor]:
        """The images as float32 in [0, 1], (n, C, H, W), and their labels (n,)."""
        if not isinstance(indices, slice):
            indices = torch.as_tensor(indices, device=self.labels.device)
        images = self.images[indices]
        return images.float().div_(255) if images.dtype == torch.uint8 else images, self.labels[indices]

    def subset(self, indices: Sequence[int] | Tensor) -> ImageSet:
        """The examples of these numbers, in this order."""
        chosen = torch.as_tensor(indices, device=self.labels.device)
        return ImageSet(self.images[chosen], self.labels[chosen], self.classes)

    def to(self, device: torch.device | str) -> ImageSet:
        return ImageSet(self.images.to(device), self.labels.to(device), self.classes)


@dataclass(frozen=True)
class Splits:
    """What is trained on, what models are selected on, and what only the last line is computed on."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet
