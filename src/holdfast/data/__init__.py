"""Image sets: whole, as uint8 on the device, with stratified and nested subsets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from holdfast.data.arrays import EDMCIFAR10, Arrays
from holdfast.data.augmentation import Augmentation
from holdfast.data.data import Data
from holdfast.data.digits import Digits
from holdfast.data.folder import FileSet, ImageFolder, ImageNette, RestrictedImageNet, TinyImageNet
from holdfast.data.hub import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST, Hub
from holdfast.data.image_set import Images, ImageSet, MappedSet, Splits
from holdfast.data.mixture import MixedSet, Mixture
from holdfast.data.principal_components import PrincipalComponents, parse_indices
from holdfast.data.subsets import drawn, stratified_order

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "EDMCIFAR10",
    "MNIST",
    "SVHN",
    "Arrays",
    "Augmentation",
    "Data",
    "Digits",
    "FashionMNIST",
    "FileSet",
    "Hub",
    "ImageFolder",
    "ImageNette",
    "ImageSet",
    "Images",
    "MappedSet",
    "MixedSet",
    "Mixture",
    "PrincipalComponents",
    "RestrictedImageNet",
    "Splits",
    "TinyImageNet",
    "drawn",
    "find_data",
    "load_data",
    "parse_indices",
    "stratified_order",
]


def load_data(name: str, **settings: Any) -> Splits:
    """The splits of a data set: ``load_data("mnist", train_size=1000)``.

    Args:
        name: a registered data set, a local folder of parquet files, or an id on the hub.
        settings: those of the data set's component.

    Raises:
        ValueError: unknown name or setting.
        FileNotFoundError: the data are not there.
    """
    return find_data(name, **settings).load()


def find_data(name: str, **settings: Any) -> Data:
    """The component of a data set, by the name that ``load_data`` takes; nothing is read yet."""
    if name not in Data.registry and ("/" in name or Path(name).is_dir()):
        return Hub(id=name if "/" in name else f"./{name}", **settings)
    return Data.parse({"name": name, **settings})
