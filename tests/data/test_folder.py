"""Folders of image files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from holdfast.data import RestrictedImageNet, load_data
from holdfast.data.folder import read_folder


def write(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (20, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part in ("train", "val"):
        for number in range(10):
            write(tmp_path / part / "ape" / f"{number}.png", (255, number, 0))
            write(tmp_path / part / "bee" / f"{number}.PNG", (0, number, 255), (9, 30))
    return tmp_path


def test_images_are_read_resized_and_labelled_by_folder(folder: Path) -> None:
    splits = load_data("folder", path=folder, size=8)
    assert splits.test.shape == (3, 8, 8)
    assert splits.test.classes == ("ape", "bee")
    assert splits.test.labels.tolist() == [0] * 10 + [1] * 10
    x, _ = splits.test.batch([3, 17])
    assert torch.equal((255 * x[:, :, 0, 0]).round(), torch.tensor([[255.0, 3.0, 0.0], [0.0, 7.0, 255.0]]))


def test_the_centre_is_kept(tmp_path: Path) -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "wide.png")
    assert (read_folder(tmp_path, 10).images == 255).all()


def test_classes_can_be_grouped_as_in_restricted_imagenet(tmp_path: Path) -> None:
    for number in range(6):
        write(tmp_path / f"n{number}" / "x.png", (10 * number, 0, 0))
    groups = {"low": range(0, 2), "high": range(4, 6)}
    images = read_folder(tmp_path, 8, groups=groups)
    assert images.classes == ("low", "high")
    assert images.labels.tolist() == [0, 0, 1, 1]
    assert images.images[:, 0, 0, 0].tolist() == [0, 10, 40, 50]
    ranges = RestrictedImageNet.groups.values()
    assert sum(map(len, ranges)) == len({number for numbers in ranges for number in numbers}) == 203
    with pytest.raises(ValueError, match="6 class folders, the groups count on a thousand"):
        read_folder(tmp_path, 8, groups=RestrictedImageNet.groups)


def test_imagenette_is_found_below_the_data_root(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for number in range(4):
            write(tmp_path / "imagenette2-160" / part / "n01" / f"{number}.JPEG", (9, 9, 9), (200, 170))
    assert load_data("imagenette", root=tmp_path, validation=0.5).test.shape == (3, 160, 160)


def test_what_is_missing_or_damaged_is_named(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*test"):
        load_data("folder", path=folder, size=8, test_part="test")
    (folder / "val" / "empty").mkdir()
    with pytest.raises(ValueError, match=r"class folder .*empty holds no images"):
        load_data("folder", path=folder, size=8)
    (folder / "val" / "empty" / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"bad\.png cannot be read as an image"):
        load_data("folder", path=folder, size=8)
    (folder / "nothing").mkdir()
    with pytest.raises(ValueError, match="no class folders"):
        read_folder(folder / "nothing", 8)
