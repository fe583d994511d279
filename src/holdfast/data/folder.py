"""Image sets as folders of image files: decoded once and kept, or streamed by worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor
from torch.utils.data import DataLoader

from holdfast.data.data import Data
from holdfast.data.hub import channels_first, data_root, locate, plain, read_hub, squared
from holdfast.data.image_set import Images, ImageSet

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
KEPT_BYTES = 4 * 2**30
"""Sets of more pixels than this are streamed."""


class UnreadableImage(OSError, ValueError):
    """An image file that cannot be decoded."""


@dataclass(frozen=True)
class Listing:
    """Image files and what they show."""

    files: tuple[Path, ...]
    labels: Tensor
    """(N,) int64 in 0..K−1."""
    classes: tuple[str, ...]


class _FileData(Data):
    """A data set of image files."""

    stream: bool | None = None
    """Decode images whenever they are asked for, in place of once; by default where they fill more than 4 GiB."""
    workers: NonNegativeInt = 4
    """Processes that decode the training images of a streamed set."""

    def kept(self, listing: Listing, size: int, resize: int | None = None) -> Images:
        """The images as squares of ``size``, the shorter side brought to ``resize`` before."""
        streamed = FileSet(listing.files, listing.labels, listing.classes, size, resize or size, self.workers)
        large = len(streamed) * 3 * size**2 > KEPT_BYTES
        return streamed if self.stream or (self.stream is None and large) else streamed.decoded()


class ImageFolder(_FileData, name="folder"):
    """A folder with a part for training and one for testing, each with a folder of images per class."""

    path: Path
    """The folder that holds both parts."""
    train_part: str = "train"
    """Name of the training part."""
    test_part: str = "val"
    """Name of the test part."""
    size: PositiveInt
    """Images are brought to this side: the shorter side resized to it, then the centre cut out."""

    @property
    def conversion(self) -> str:
        return f"RGB, the shorter side brought to {self.size}, the centre cut out"

    def read(self) -> tuple[Images, Images]:
        train, test = (list_folder(self.path / part) for part in (self.train_part, self.test_part))
        return self.kept(train, self.size), self.kept(test, self.size)


class ImageNette(_FileData, name="imagenette"):
    """13,394 photographs of ten easy ImageNet classes, 160 × 160 pixels: the 160-pixel release, centre cropped."""

    root: Path | None = None
    """Folder that holds ``imagenette2-160``; ``$HOLDFAST_DATA`` by default."""

    @property
    def conversion(self) -> str:
        return "RGB, the centre cut out"

    def read(self) -> tuple[Images, Images]:
        train, test = (list_folder(data_root(self.root) / "imagenette2-160" / part) for part in ("train", "val"))
        return self.kept(train, 160), self.kept(test, 160)


class RestrictedImageNet(_FileData, name="restricted-imagenet"):
    """Nine groups of ImageNet classes at 64 × 64 pixels (Tsipras et al., 2019).

    The groups are ranges of the thousand sorted class folders, or of the hub's labels. Images are resized
    to 72 pixels on the shorter side and the centre of 64 is cut out.
    """

    root: Path | None = None
    """Folder that holds ``imagenet`` with its parts ``train`` and ``val``, or ``imagenet-1k`` in the hub's layout;
    ``$HOLDFAST_DATA`` by default. The hub's own needs an account there."""
    groups: ClassVar[dict[str, range]] = {
        "dog": range(151, 269),
        "cat": range(281, 286),
        "frog": range(30, 33),
        "turtle": range(33, 38),
        "bird": range(80, 101),
        "primate": range(365, 383),
        "fish": range(389, 398),
        "crab": range(118, 122),
        "insect": range(300, 320),
    }

    @property
    def conversion(self) -> str:
        return "RGB, the shorter side brought to 72, the centre of 64 cut out"

    def read(self) -> tuple[Images, Images]:
        folder = locate("imagenet", self.root)
        if folder is None:
            parts = ("train", "validation")
            return read_hub(
                *("imagenet-1k", "ILSVRC/imagenet-1k", self.root, parts), size=64, resize=72, groups=self.groups
            )
        train, test = (list_folder(folder / part, groups=self.groups) for part in ("train", "val"))
        return self.kept(train, 64, resize=72), self.kept(test, 64, resize=72)


class TinyImageNet(_FileData, name="tiny-imagenet"):
    """110,000 photographs of 64 × 64 pixels in 200 classes; its validation part is the test part here."""

    root: Path | None = None
    """Folder that holds ``tiny-imagenet-200`` as it is published, or ``tiny-imagenet`` in the hub's layout;
    ``$HOLDFAST_DATA`` by default."""

    def read(self) -> tuple[Images, Images]:
        folder = locate("tiny-imagenet-200", self.root)
        if folder is None:
            return read_hub("tiny-imagenet", "zh-plus/tiny-imagenet", self.root, ("train", "valid"))
        train = list_folder(folder / "train")
        annotations = folder / "val" / "val_annotations.txt"
        lines = [line.split("\t")[:2] for line in annotations.read_text("utf-8").splitlines()]
        if any(len(line) < 2 or line[1] not in train.classes for line in lines):
            raise ValueError(f"{annotations} does not name a file and a class of the training part in every line")
        files = tuple(folder / "val" / "images" / name for name, _ in lines)
        test = Listing(files, torch.tensor([train.classes.index(name) for _, name in lines]), train.classes)
        return self.kept(train, 64), self.kept(test, 64)


def list_folder(folder: Path, groups: dict[str, range] | None = None) -> Listing:
    """All images below the class folders of a folder.

    Args:
        groups: new classes as ranges of the sorted class folders; the folders themselves by default.

    Raises:
        FileNotFoundError: the folder is not there.
        ValueError: it holds no class folders, or a class is empty.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    if not classes:
        raise ValueError(f"{folder} holds no class folders")
    if groups and max(numbers.stop for numbers in groups.values()) > len(classes):
        raise ValueError(f"{folder} holds {len(classes)} class folders, the groups count on a thousand")
    chosen = groups or {path.name: range(number, number + 1) for number, path in enumerate(classes)}
    files: list[Path] = []
    labels: list[int] = []
    for label, numbers in enumerate(chosen.values()):
        for number in numbers:
            found = sorted(path for path in classes[number].rglob("*") if path.suffix.lower() in SUFFIXES)
            if not found:
                raise ValueError(f"the class folder {classes[number]} holds no images")
            files += found
            labels += [label] * len(found)
    return Listing(tuple(files), torch.tensor(labels), tuple(chosen))


@dataclass(frozen=True)
class FileSet(Images):
    """Labelled images in files of their own, decoded when they are asked for."""

    files: tuple[Path, ...]
    labels: Tensor
    """(N,) int64 in 0..K−1."""
    classes: tuple[str, ...]
    """The K names."""
    size: int
    """Side of the images, (3, size, size)."""
    resize: int
    """What the shorter side is brought to before the centre is cut out."""
    workers: int
    """Processes that decode for ``stream``."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return 3, self.size, self.size

    def pixels(self, indices: Sequence[int] | Tensor | slice) -> Tensor:
        """uint8 images (n, 3, size, size) on the CPU.

        Raises:
            UnreadableImage: naming the file.
        """
        every = torch.arange(len(self))
        numbers = every[indices if isinstance(indices, slice) else torch.as_tensor(indices, dtype=torch.int64)]
        if not len(numbers):
            return torch.empty(0, *self.shape, dtype=torch.uint8)
        with ThreadPoolExecutor() as threads:
            squares = threads.map(lambda i: _square(self.files[i], self.size, self.resize), numbers)
            return channels_first(np.stack(list(squares)))

    def decoded(self) -> ImageSet:
        """The same set whole in memory."""
        return ImageSet(self.pixels(slice(None)), self.labels, self.classes)

    def batch(self, indices: Sequence[int] | Tensor | slice) -> tuple[Tensor, Tensor]:
        return self._placed(self.pixels(indices), indices)

    def stream(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """``batch`` of each of these, decoded ahead by worker processes."""
        loader: DataLoader[Tensor | UnreadableImage] = DataLoader(
            _Decoder(self),  # type: ignore[arg-type]
            sampler=batches,
            batch_size=None,
            num_workers=self.workers,
            pin_memory=self.labels.is_cuda,
            generator=torch.Generator(),  # or it draws from the global one
        )
        for indices, pixels in zip(batches, loader, strict=True):
            if isinstance(pixels, UnreadableImage):
                raise pixels
            yield self._placed(pixels, indices)

    def _placed(self, pixels: Tensor, indices: Sequence[int] | Tensor | slice) -> tuple[Tensor, Tensor]:
        chosen = (
            indices
            if isinstance(indices, slice)
            else torch.as_tensor(indices, dtype=torch.int64).to(self.labels.device)
        )
        return pixels.to(self.labels.device, non_blocking=True).float().div_(255), self.labels[chosen]

    def subset(self, indices: Sequence[int] | Tensor) -> FileSet:
        """The examples of these numbers, in this order; nothing is read."""
        numbers = torch.as_tensor(indices)
        return replace(self, files=tuple(self.files[i] for i in numbers), labels=self.labels[numbers])

    def to(self, device: torch.device | str) -> FileSet:
        return replace(self, labels=self.labels.to(device))


class _Decoder:
    """What a worker process runs: numbers in, pixels out, or the fault, which would lose its form on the way."""

    def __init__(self, images: FileSet) -> None:
        self.images = images.to("cpu")

    def __getitem__(self, indices: Tensor) -> Tensor | UnreadableImage:
        try:
            return self.images.pixels(indices)
        except UnreadableImage as fault:
            return fault


def _square(path: Path, size: int, resize: int) -> np.ndarray:
    """An image as RGB (size, size, 3): the shorter side resized, the centre cut out."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            return squared(plain(opened), size, resize)
    except (OSError, SyntaxError, Image.DecompressionBombError) as fault:
        raise UnreadableImage(f"{path} cannot be read as an image: {fault}") from fault
