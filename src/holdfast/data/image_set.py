"""Labelled images: whole as one uint8 tensor, or mapped from files; and the splits of a data set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from holdfast.inference import mix_seed


class Images(ABC):
    """What training and evaluation ask of labelled images, however they are kept."""

    labels: Tensor
    """(N,) int64 in 0..K−1."""
    classes: tuple[str, ...]
    """The K names."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""

    @abstractmethod
    def batch(self, indices: Sequence[int] | Tensor | slice) -> tuple[Tensor, Tensor]:
        """The images as float32 in [0, 1], (n, C, H, W), and their labels (n,)."""

    @abstractmethod
    def subset(self, indices: Sequence[int] | Tensor) -> Images:
        """The examples of these numbers, in this order."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Images:
        """The same with batches on a device."""

    @property
    def epoch_size(self) -> int:
        """How many images an epoch of training presents."""
        return len(self)

    def order(self, epoch: int, seed: int) -> Tensor:
        """The numbers of the images of an epoch in the order in which they are trained on, (epoch_size,)."""
        return permutation(len(self), seed, epoch, 1)

    def stream(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """``batch`` of each of these, one after another."""
        return map(self.batch, batches)


def _numbers(indices: Sequence[int] | Tensor, count: int) -> Tensor:
    """Indices as numbers 0..count−1: a mask names its true entries, negative numbers count from the end."""
    chosen = torch.as_tensor(indices)
    if chosen.dtype == torch.bool:
        return chosen.nonzero().squeeze(1)
    return torch.where(chosen < 0, chosen + count, chosen).long()


def permutation(count: int, *seed: int) -> Tensor:
    """0..count−1 in a random order that the seed determines."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(mix_seed(*seed)))


@dataclass(frozen=True)
class ImageSet(Images):
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

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def batch(self, indices: Sequence[int] | Tensor | slice) -> tuple[Tensor, Tensor]:
        """The images as float32 in [0, 1], (n, C, H, W), and their labels (n,)."""
        if isinstance(indices, slice):
            images, labels = self.images[indices], self.labels[indices]
        else:  # index_select is many times faster than advanced indexing
            numbers = _numbers(indices, len(self)).to(self.labels.device)
            images, labels = self.images.index_select(0, numbers), self.labels.index_select(0, numbers)
        return images.float().div_(255) if images.dtype == torch.uint8 else images.clone(), labels

    def subset(self, indices: Sequence[int] | Tensor) -> ImageSet:
        """The examples of these numbers, in this order."""
        chosen = _numbers(indices, len(self)).to(self.labels.device)
        return ImageSet(self.images[chosen], self.labels[chosen], self.classes)

    def to(self, device: torch.device | str) -> ImageSet:
        return ImageSet(self.images.to(device), self.labels.to(device), self.classes)


@dataclass(frozen=True)
class MappedSet(Images):
    """Labelled images in files too large for memory: a batch is gathered from them when it is asked for."""

    parts: tuple[np.ndarray, ...]
    """uint8 arrays (N_i, H, W, C), usually memory-mapped; together one long list of images."""
    rows: Tensor
    """Which images of that list are in the set, (N,) int64."""
    labels: Tensor
    """(N,) int64 in 0..K−1."""
    classes: tuple[str, ...]
    """The K names."""

    def __post_init__(self) -> None:
        if len({part.shape[1:] for part in self.parts}) != 1 or len(self.labels) != len(self.rows):
            shapes = ", ".join(str(part.shape) for part in self.parts)
            raise ValueError(f"parts of {shapes} with {len(self.labels)} labels do not make one set of images")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        height, width, channels = self.parts[0].shape[1:]
        return channels, height, width

    def batch(self, indices: Sequence[int] | Tensor | slice) -> tuple[Tensor, Tensor]:
        """The images as float32 in [0, 1], (n, C, H, W), and their labels (n,), where the labels are."""
        if not isinstance(indices, slice):
            indices = torch.as_tensor(indices, dtype=torch.int64)
        rows = self.rows[indices].numpy()
        pixels = np.empty((len(rows), *self.parts[0].shape[1:]), np.uint8)
        ends = np.cumsum([len(part) for part in self.parts])
        number = np.searchsorted(ends, rows, side="right")
        for i, part in enumerate(self.parts):
            here = number == i
            pixels[here] = part[rows[here] - (ends[i] - len(part))]
        chosen = indices if isinstance(indices, slice) else indices.to(self.labels.device)
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.labels.device)
        return x.float().div_(255), self.labels[chosen]

    def subset(self, indices: Sequence[int] | Tensor) -> MappedSet:
        """The examples of these numbers, in this order; nothing is read."""
        chosen = torch.as_tensor(indices)
        return MappedSet(self.parts, self.rows[chosen], self.labels[chosen], self.classes)

    def to(self, device: torch.device | str) -> MappedSet:
        """The same with batches on a device."""
        return MappedSet(self.parts, self.rows, self.labels.to(device), self.classes)


@dataclass(frozen=True)
class Splits:
    """What is trained on, what models are selected on, and what only the last line is computed on."""

    train: Images
    validation: Images
    test: Images
