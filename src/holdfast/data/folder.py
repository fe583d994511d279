"""Image sets as folders of image files, one folder per class."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from pydantic import PositiveInt

from holdfast.data.data import Data
from holdfast.data.hub import channels_first, data_root, plain
from holdfast.data.image_set import ImageSet

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


class ImageFolder(Data, name="folder"):
    """A folder with a part for training and one for testing, each with a folder of images per class."""

    path: Path
    """The folder that holds both parts."""
    train_part: str = "train"
    """Name of the training part."""
    test_part: str = "val"
    """Name of the test part."""
    size: PositiveInt
    """Images are brought to this side: the shorter side resized to it, then the centre cut out."""

    def read(self) -> tuple[ImageSet, ImageSet]:
        train, test = (read_folder(self.path / part, self.size) for part in (self.train_part, self.test_part))
        return train, test


class ImageNette(Data, name="imagenette"):
    """13,394 photographs of ten easy ImageNet classes, 160 × 160 pixels: the 160-pixel release, centre cropped."""

    root: Path | None = None
    """Folder that holds ``imagenette2-160``; ``$HOLDFAST_DATA`` by default."""

    def read(self) -> tuple[ImageSet, ImageSet]:
        folder = data_root(self.root) / "imagenette2-160"
        return read_folder(folder / "train", 160), read_folder(folder / "val", 160)


class RestrictedImageNet(Data, name="restricted-imagenet"):
    """Nine groups of ImageNet classes at 64 × 64 pixels (Tsipras et al., 2019), from ImageNet's folders.

    The groups are ranges of the thousand sorted class folders. Images are resized to 72 pixels on the
    shorter side and the centre of 64 is cut out.
    """

    root: Path | None = None
    """Folder that holds ``imagenet`` with its parts ``train`` and ``val``; ``$HOLDFAST_DATA`` by default."""
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

    def read(self) -> tuple[ImageSet, ImageSet]:
        folder = data_root(self.root) / "imagenet"
        train, test = (read_folder(folder / part, 64, resize=72, groups=self.groups) for part in ("train", "val"))
        return train, test


def read_folder(
    folder: Path, size: int, *, resize: int | None = None, groups: dict[str, range] | None = None
) -> ImageSet:
    """All images below the class folders of a folder, as uint8 squares.

    Args:
        resize: bring the shorter side to this first; to ``size`` by default.
        groups: new classes as ranges of the sorted class folders; the folders themselves by default.

    Raises:
        FileNotFoundError: the folder is not there.
        ValueError: it holds no class folders, a class is empty, or an image cannot be read.
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
            found = sorted(path for path in classes[number].iterdir() if path.suffix.lower() in SUFFIXES)
            if not found:
                raise ValueError(f"the class folder {classes[number]} holds no images")
            files += found
            labels += [label] * len(found)

    def read(path: Path) -> np.ndarray:
        return _square(path, size, resize or size)

    with ThreadPoolExecutor() as workers:
        arrays = np.stack(list(workers.map(read, files)))
    return ImageSet(channels_first(arrays), torch.tensor(labels), tuple(chosen))


def _square(path: Path, size: int, resize: int) -> np.ndarray:
    """An image as RGB (size, size, 3): the shorter side resized, the centre cut out."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            image = plain(opened).convert("RGB")
    except OSError as fault:
        raise ValueError(f"{path} cannot be read as an image: {fault}") from fault
    scale = resize / min(image.size)
    resized = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return np.asarray(resized.crop((left, top, left + size, top + size)))
