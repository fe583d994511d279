"""Image sets as NumPy files: an .npz with images and labels, or a pair of .npy; mapped, never copied whole."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.lib import format as npy

from holdfast.data.data import Data
from holdfast.data.hub import CIFAR10, data_root
from holdfast.data.image_set import Images, MappedSet

IMAGE_KEYS, LABEL_KEYS = ("image", "images", "x", "data"), ("label", "labels", "y", "targets")


class Arrays(Data, name="arrays"):
    """NumPy files of uint8 images (N, H, W, C) or (N, H, W) and their labels."""

    train: list[Path]
    """One .npz, or the .npy of the images and that of the labels."""
    test: list[Path]
    """The same for the test part."""

    def read(self) -> tuple[Images, Images]:
        (x, y), (x_test, y_test) = read_arrays(self.train), read_arrays(self.test)
        classes = tuple(map(str, range(int(max(y.max(), y_test.max())) + 1)))
        return _mapped([x], [y], classes), _mapped([x_test], [y_test], classes)


class EDMCIFAR10(Data, name="edm-cifar10"):
    """CIFAR-10 images that a diffusion model generated (Wang et al., 2023), and the real test part.

    The files ``1m.npz`` (or ``5m``, ``10m``; ``20m_part1.npz`` and so on for the larger ones) hold ``image``
    and ``label``. They are memory-mapped where they are stored uncompressed, and gathered by batch.
    """

    version: Literal["1m", "5m", "10m", "20m", "50m"] = "1m"
    """How many images."""
    root: Path | None = None
    """Folder that holds ``edm-cifar10`` and ``cifar10``; ``$HOLDFAST_DATA`` by default."""
    parts: ClassVar[dict[str, int]] = {"1m": 1, "5m": 1, "10m": 1, "20m": 2, "50m": 4}

    def read(self) -> tuple[Images, Images]:
        _, test = CIFAR10(root=self.root).read()
        folder, count = data_root(self.root) / "edm-cifar10", self.parts[self.version]
        names = [f"{self.version}_part{i + 1}.npz" for i in range(count)] if count > 1 else [f"{self.version}.npz"]
        parts = [read_arrays([folder / name]) for name in names]
        return _mapped([x for x, _ in parts], [y for _, y in parts], test.classes), test


def read_arrays(paths: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of an .npz, or of two .npy; memory-mapped where the file allows it.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: it cannot be read, or holds no images and labels that belong together.
    """
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
    try:
        if len(paths) == 1:
            x, y = (_npz_member(paths[0], keys) for keys in (IMAGE_KEYS, LABEL_KEYS))
        elif len(paths) == 2:
            x, y = (np.load(path, mmap_mode="c", allow_pickle=False) for path in paths)
        else:
            raise ValueError(f"expected one .npz or two .npy, given {len(paths)} files")
    except (zipfile.BadZipFile, EOFError) as fault:
        raise ValueError(f"{paths[0]} cannot be read: {fault}") from fault
    if (
        x.dtype != np.uint8
        or x.ndim not in (3, 4)
        or y.shape != x.shape[:1]
        or not np.issubdtype(y.dtype, np.integer)
    ):
        raise ValueError(
            f"expected uint8 images (N, H, W[, C]) and as many integer labels in {', '.join(map(str, paths))}, "
            f"found {x.shape} of {x.dtype} and {y.shape} of {y.dtype}"
        )
    return x, y


def _npz_member(path: Path, keys: tuple[str, ...]) -> np.ndarray:
    """One array of an .npz: mapped where it is stored as it is, read where it is compressed."""
    with zipfile.ZipFile(path) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist()}
        key = next((key for key in keys if key in members), None)
        if key is None:
            raise ValueError(f"{path} holds none of {', '.join(keys)}; it holds {', '.join(members)}")
        info = archive.getinfo(members[key])
        with archive.open(info) as file:
            if info.compress_type != zipfile.ZIP_STORED:
                return npy.read_array(file, allow_pickle=False)
            version = npy.read_magic(file)
            read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, fortran, dtype = read_header(file)
            header = file.tell()
    with open(path, "rb") as raw:
        raw.seek(info.header_offset + 26)  # the lengths of name and extra field in the local header
        name, extra = int.from_bytes(raw.read(2), "little"), int.from_bytes(raw.read(2), "little")
    offset = info.header_offset + 30 + name + extra + header
    return np.memmap(path, dtype, "c", offset, shape, "F" if fortran else "C")


def _mapped(images: list[np.ndarray], labels: list[np.ndarray], classes: tuple[str, ...]) -> MappedSet:
    """A set over several arrays of images, which are not read."""
    together = torch.from_numpy(np.concatenate(labels).astype(np.int64))
    if len(together) and not 0 <= int(together.min()) <= int(together.max()) < len(classes):
        given = f"{together.min()} to {together.max()}"
        raise ValueError(f"labels run from {given}, but there are {len(classes)} classes")
    parts = tuple(array if array.ndim == 4 else array[..., None] for array in images)
    return MappedSet(parts, torch.arange(len(together)), together, classes)
