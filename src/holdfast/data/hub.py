"""Image sets in the Hugging Face hub's layout: a folder of parquet files, or an id on the hub."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from holdfast.component import nearest
from holdfast.data.data import Data
from holdfast.data.image_set import ImageSet


class _HubData(Data):
    """Reads whole splits of an image set with an image and a label column."""

    root: Path | None = None
    """Folder searched for the data set before the hub; ``$HOLDFAST_DATA`` by default."""
    folder: ClassVar[str]
    hub_id: ClassVar[str]
    config: ClassVar[str | None] = None
    label_column: ClassVar[str | None] = None

    def read(self) -> tuple[ImageSet, ImageSet]:
        return read_hub(self.folder, self.hub_id, self.root, label_column=self.label_column, config=self.config)


class MNIST(_HubData, name="mnist"):
    """70,000 handwritten digits of 28 × 28 pixels (LeCun et al., 1998)."""

    folder, hub_id = "mnist", "ylecun/mnist"


class CIFAR10(_HubData, name="cifar10"):
    """60,000 colour photographs of 32 × 32 pixels in ten classes (Krizhevsky, 2009)."""

    folder, hub_id = "cifar10", "uoft-cs/cifar10"


class FashionMNIST(_HubData, name="fashion-mnist"):
    """70,000 grey pictures of clothes of 28 × 28 pixels (Xiao et al., 2017)."""

    folder, hub_id = "fashion-mnist", "zalando-datasets/fashion_mnist"


class CIFAR100(_HubData, name="cifar100"):
    """60,000 colour photographs of 32 × 32 pixels in a hundred classes (Krizhevsky, 2009)."""

    folder, hub_id, label_column = "cifar100", "uoft-cs/cifar100", "fine_label"


class SVHN(_HubData, name="svhn"):
    """99,289 cropped house numbers of 32 × 32 pixels, without the extra part (Netzer et al., 2011)."""

    folder, hub_id, config = "svhn", "ufldl-stanford/svhn", "cropped_digits"


class Hub(Data, name="hub"):
    """Any image set on the hub, or in a local folder of parquet files, with an image and a label column."""

    id: str
    """An id on the hub such as ``ylecun/mnist``, or a local folder."""
    root: Path | None = None
    """Folder searched for the id before the hub; ``$HOLDFAST_DATA`` by default."""
    train_split: str = "train"
    """Name of the training part."""
    test_split: str = "test"
    """Name of the test part."""
    image_column: str | None = None
    """Column of the images; the only image column by default."""
    label_column: str | None = None
    """Column of the labels; the only class-label column by default, or else ``label``."""

    def read(self) -> tuple[ImageSet, ImageSet]:
        return read_hub(
            self.id,
            self.id,
            self.root,
            (self.train_split, self.test_split),
            self.image_column,
            self.label_column,
        )


def read_hub(
    folder: str,
    hub_id: str,
    root: Path | None,
    splits: tuple[str, str] = ("train", "test"),
    image_column: str | None = None,
    label_column: str | None = None,
    config: str | None = None,
    size: int | None = None,
    resize: int | None = None,
    groups: dict[str, range] | None = None,
) -> tuple[ImageSet, ImageSet]:
    """Two splits of a data set, from ``root/folder`` where that exists, or else from the hub.

    Args:
        size, resize: make RGB squares of the images (see ``squared``); otherwise all must be of one shape.
        groups: new classes as ranges of the labels; images of no group are left out unread.

    Raises:
        FileNotFoundError: neither is to be had; the message says where was looked and what to do.
        ValueError: a split or column that is not there, or images that are not alike or not readable.
    """
    import datasets

    path = locate(folder, root)
    datasets.disable_progress_bars()
    with _writable_cache() as cache:
        try:
            parts = (
                datasets.load_dataset(str(path), cache_dir=cache) if path else datasets.load_dataset(hub_id, config)
            )
        except (OSError, datasets.exceptions.DatasetNotFoundError) as fault:
            if path:
                raise FileNotFoundError(f"{path} holds no readable data set: {fault}") from fault
            raise FileNotFoundError(
                f"data set {folder!r} was not found in {_sought(root)}, and the hub gave no {hub_id!r} ({fault}); "
                f"put its parquet files in a folder {Path(folder).name!r} and name the folder above it in "
                "data.root or HOLDFAST_DATA"
            ) from fault
        except (datasets.exceptions.DatasetGenerationError, ValueError) as fault:
            raise ValueError(f"{path or hub_id} cannot be read: {fault.__cause__ or fault}") from fault
        for split in splits:
            if split not in parts:
                raise ValueError(f"{path or hub_id} has no split {split!r}; {nearest(split, parts)}")
        shaping = size, resize, groups
        train, test = (_image_set(parts[split], image_column, label_column, *shaping) for split in splits)
    return train, test


@contextlib.contextmanager
def _writable_cache() -> Iterator[str | None]:
    """None, which is where datasets unpacks by itself, or a temporary folder where there is no home to write to."""
    import datasets

    usual, writable = Path(datasets.config.HF_DATASETS_CACHE), False
    with contextlib.suppress(OSError):
        if usual.is_absolute():  # otherwise nobody has a home, and the folder would be called ~
            usual.mkdir(parents=True, exist_ok=True)
            writable = os.access(usual, os.W_OK)
    if writable:
        yield None
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield folder


def locate(folder: str, root: Path | None) -> Path | None:
    """The local folder of a data set, where there is one: as given, or below the data root.

    Raises:
        FileNotFoundError: the data root itself is named but does not exist.
    """
    candidates = [data_root(root) / folder] if root or os.environ.get("HOLDFAST_DATA") else []
    candidates += [Path(folder)] if "/" in folder else []  # never a stray folder that happens to have the name
    return next((path for path in candidates if path.is_dir() and any(path.iterdir())), None)


def data_root(root: Path | None) -> Path:
    """The folder of data sets: the one named, or ``$HOLDFAST_DATA``.

    Raises:
        FileNotFoundError: neither is named, or it is not there.
    """
    base = root or (Path(os.environ["HOLDFAST_DATA"]) if os.environ.get("HOLDFAST_DATA") else None)
    if base is None:
        raise FileNotFoundError("name the folder of data sets in data.root or HOLDFAST_DATA")
    if not base.is_dir():
        raise FileNotFoundError(f"the data folder {base} is not there ({_sought(root)})")
    return base


def _sought(root: Path | None) -> str:
    if root:
        return f"data.root={root}"
    return f"HOLDFAST_DATA={os.environ.get('HOLDFAST_DATA', '')}"


def _image_set(
    part: Any,
    image_column: str | None,
    label_column: str | None,
    size: int | None,
    resize: int | None,
    groups: dict[str, range] | None,
) -> ImageSet:
    import datasets
    from PIL import Image

    kinds = part.features
    image_column = image_column or _only(kinds, datasets.Image, "image")
    label_column = label_column or _only(kinds, datasets.ClassLabel, "label")
    for column in (image_column, label_column):
        if column not in kinds:
            raise ValueError(f"there is no column {column!r}; {nearest(column, kinds)}")
    if groups:
        group_of = {label: group for group, labels in enumerate(groups.values()) for label in labels}
        chosen = [row for row, label in enumerate(part[label_column][:]) if label in group_of]
        if not chosen:
            raise ValueError(f"no image has a label of the groups {', '.join(groups)}")
        part = part.select(chosen)
    encoded = part.cast_column(image_column, datasets.Image(decode=False))[image_column]
    arrays = []
    for number, image in enumerate(encoded):
        try:
            source = io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]
            opened = plain(Image.open(source))
            array = np.asarray(opened) if size is None else squared(opened, size, resize or size)
        except OSError as fault:
            raise ValueError(f"image {number} of column {image_column!r} is not readable: {fault}") from fault
        arrays.append(array)
        if array.shape != arrays[0].shape or array.dtype != np.uint8:
            raise ValueError(
                f"image {number} is {array.shape} of {array.dtype}, the first is {arrays[0].shape}; "
                "all must be uint8 of one shape"
            )
    images = channels_first(np.stack(arrays))
    numbers = np.asarray(part[label_column][:])
    if not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(f"column {label_column!r} does not hold integer labels, but {numbers.dtype}")
    if groups:
        return ImageSet(images, torch.tensor([group_of[label] for label in numbers.tolist()]), tuple(groups))
    labels = torch.from_numpy(numbers.astype(np.int64))
    names = getattr(kinds[label_column], "names", None) or map(str, range(int(labels.max()) + 1))
    return ImageSet(images, labels, tuple(names))


def channels_first(images: np.ndarray) -> torch.Tensor:
    """(N, H, W) or (N, H, W, C) as a contiguous tensor (N, C, H, W)."""
    tensor = torch.from_numpy(images)
    return tensor.unsqueeze(1) if tensor.dim() == 3 else tensor.permute(0, 3, 1, 2).contiguous()


def plain(image: Any) -> Any:
    """An image as grey levels or RGB: palettes are looked up, transparency is dropped, 16 bits become 8."""
    from PIL import Image

    if image.mode in ("L", "RGB"):
        return image
    if image.mode.startswith("I"):  # 16 bits, which PIL itself would cut off at 255
        return Image.fromarray((np.asarray(image).astype(np.int64) // 257).clip(0, 255).astype(np.uint8))
    return image.convert("L" if image.mode in ("1", "LA") else "RGB")


def squared(image: Any, size: int, resize: int) -> np.ndarray:
    """An image as RGB (size, size, 3): the shorter side brought to ``resize``, the centre cut out."""
    from PIL import Image

    image = image.convert("RGB")
    scale = resize / min(image.size)
    resized = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def _only(features: Any, kind: type, default: str) -> str:
    columns = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(columns) > 1:
        raise ValueError(f"there are several columns of kind {kind.__name__}, name one: {', '.join(columns)}")
    return columns[0] if columns else default
