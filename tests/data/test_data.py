"""Data sets: the contract of the splits, nested subsets, and the hub's layout on disk."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from holdfast.data import Hub, ImageSet, load_data, stratified_order


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


def write_parquet(folder: Path, pixels: np.ndarray, labels: list[int], column: str = "image") -> None:
    """A data set in the hub's layout: train and test parts of the same images."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = pd.DataFrame({column: [{"bytes": png(a), "path": None} for a in pixels], "label": labels})
    for split in ("train", "test"):
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HOLDFAST_DATA", raising=False)
    return tmp_path


def test_digits_are_whole_images_in_the_unit_interval() -> None:
    splits = load_data("digits")
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [1293, 144, 360]
    x, y = splits.train.batch([0, 5, 3])
    assert x.shape == (3, 1, 8, 8)
    assert x.dtype == torch.float32
    assert (x.min(), x.max()) == (0, 1)
    assert y.dtype == torch.int64
    assert splits.test.classes == tuple("0123456789")
    from sklearn.datasets import load_digits

    originals = {digit.tobytes() for digit in load_digits().images}
    parts = [part.images for part in (splits.train, splits.validation, splits.test)]
    restored = torch.cat(parts).squeeze(1).mul(16 / 255).round().double().numpy()
    assert {digit.tobytes() for digit in restored} == originals


def test_splits_are_stratified_fixed_and_disjoint() -> None:
    splits, again = load_data("digits"), load_data("digits")
    assert torch.equal(splits.train.images, again.train.images)
    assert torch.equal(splits.validation.images, again.validation.images)
    for part in (splits.train, splits.validation, splits.test):
        counts = torch.bincount(part.labels, minlength=10) / len(part)
        assert (counts - 0.1).abs().max() < 0.02
    assert not torch.equal(load_data("digits", split_seed=1).validation.images, splits.validation.images)


def test_train_size_is_nested_and_leaves_validation_alone() -> None:
    whole, small, smaller = (load_data("digits", train_size=n) for n in (None, 200, 50))
    assert len(small.train) == 200
    assert torch.equal(small.train.images[:50], smaller.train.images)
    assert torch.equal(whole.train.images[:200], small.train.images)
    assert torch.equal(small.validation.images, whole.validation.images)
    assert torch.bincount(smaller.train.labels).tolist() == pytest.approx([5] * 10, abs=1)
    with pytest.raises(ValueError, match="train_size=1294, but 1293 training images remain beside 144"):
        load_data("digits", train_size=1294)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 1000))
def test_every_prefix_of_the_order_is_stratified(labels: list[int], seed: int) -> None:
    y = torch.tensor(labels)
    order = stratified_order(y, seed)
    assert sorted(order.tolist()) == list(range(len(labels)))
    assert torch.equal(order, stratified_order(y, seed))
    shares = torch.bincount(y, minlength=5) / len(y)
    for n in range(1, len(y) + 1):
        assert (torch.bincount(y[order[:n]], minlength=5) - n * shares).abs().max() <= 3


@pytest.mark.parametrize("channels", [1, 3])
def test_reads_the_hubs_layout_from_a_local_folder(cache: Path, channels: int) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 6, 5, channels), dtype=np.uint8).squeeze(-1 if channels == 1 else ())
    labels = [i % 2 for i in range(20)]
    write_parquet(cache / "data" / "mine", pixels, labels)
    splits = load_data("hub", id="mine", root=cache / "data")
    direct = load_data(str(cache / "data" / "mine"))
    assert splits.test.shape == (channels, 6, 5)
    assert torch.equal(splits.train.images, direct.train.images)
    expected = torch.from_numpy(pixels).view(20, 6, 5, channels).permute(0, 3, 1, 2)
    assert torch.equal(splits.test.images, expected)
    assert splits.test.labels.tolist() == labels
    assert len(splits.train) + len(splits.validation) == 20


@pytest.mark.parametrize("home", ["file/below", "~/nobody"])
def test_local_data_are_read_where_there_is_no_home_to_write_to(
    cache: Path, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets.config

    write_parquet(cache / "mine", np.zeros((10, 4, 4), np.uint8), [0] * 10)
    (cache / "file").write_text("no folder can be made below it")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(home) if "~" in home else cache / home)
    monkeypatch.chdir(cache)
    assert len(load_data("hub", id="mine", root=cache, validation=0.5).test) == 10
    assert not (cache / "~").exists()


def test_the_data_root_is_searched_before_the_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(cache / "roots" / "mnist", np.zeros((10, 4, 4), np.uint8), [0] * 10)
    monkeypatch.setenv("HOLDFAST_DATA", str(cache / "roots"))
    assert load_data("mnist").test.shape == (1, 4, 4)


def test_data_that_are_not_there_say_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"data folder .*nowhere is not there"):
        load_data("mnist", root=cache / "nowhere")
    (cache / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"'mnist' was not found in .*data\.root or HOLDFAST_DATA"):
        load_data("mnist", root=cache / "empty")
    monkeypatch.setenv("HOLDFAST_DATA", str(cache / "gone"))
    with pytest.raises(FileNotFoundError, match="HOLDFAST_DATA"):
        load_data("cifar10")
    with pytest.raises(ValueError, match="did you mean 'mnist'"):
        load_data("minst")


def test_damaged_data_are_named(cache: Path) -> None:
    folder = cache / "bad"
    write_parquet(folder, np.zeros((10, 4, 4), np.uint8), [0] * 10)
    with pytest.raises(ValueError, match="no split 'tset'; did you mean 'test'"):
        Hub(id=str(folder), test_split="tset").load()
    with pytest.raises(ValueError, match="no column 'imag'; did you mean 'image'"):
        Hub(id=str(folder), image_column="imag").load()
    rows = pd.DataFrame({"image": [{"bytes": b"no image", "path": None}] * 4, "label": [0] * 4})
    rows.to_parquet(folder / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"image 0 .* is not readable"):
        Hub(id=str(folder)).load()
    write_parquet(cache / "sizes", np.zeros((10, 4, 4), np.uint8), [0] * 10)
    images = [png(np.zeros((4, 4), np.uint8)), png(np.zeros((5, 4), np.uint8))]
    rows = pd.DataFrame({"image": [{"bytes": b, "path": None} for b in images], "label": [0, 0]})
    rows.to_parquet(cache / "sizes" / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"image 1 is .*of one shape"):
        Hub(id=str(cache / "sizes")).load()
    (folder / "train-00000-of-00001.parquet").write_bytes(b"not a parquet file")
    with pytest.raises(ValueError, match="cannot be read"):
        Hub(id=str(folder)).load()


def test_palettes_are_colours_and_labels_are_whole_numbers(cache: Path) -> None:
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colours).quantize(4).save(buffer, "png")
    rows = pd.DataFrame({"image": [{"bytes": buffer.getvalue(), "path": None}] * 10, "label": [0] * 10})
    for split in ("train", "test"):
        (cache / "palette").mkdir(exist_ok=True)
        rows.to_parquet(cache / "palette" / f"{split}-00000-of-00001.parquet")
    images = load_data(str(cache / "palette")).test.images
    assert torch.equal(images[0], torch.from_numpy(colours).permute(2, 0, 1))
    for labels in ([0.7] * 10, [None] * 10):
        rows.assign(label=labels).to_parquet(cache / "palette" / "train-00000-of-00001.parquet")
        with pytest.raises(ValueError, match=r"does not hold integer labels|cannot be read"):
            load_data(str(cache / "palette"))


def test_no_part_may_be_empty_and_parts_must_be_alike(cache: Path) -> None:
    for share in (0.0001, 0.9999):
        with pytest.raises(ValueError, match="none may be empty"):
            load_data("digits", validation=share)
    write_parquet(cache / "odd", np.zeros((10, 4, 4), np.uint8), [0] * 10)
    rows = pd.DataFrame({"image": [{"bytes": png(np.zeros((5, 5), np.uint8)), "path": None}], "label": [0]})
    rows.to_parquet(cache / "odd" / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="they must be alike"):
        load_data(str(cache / "odd"))


def test_a_stray_folder_of_the_name_is_not_the_data(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "mnist").mkdir()
    (cache / "mnist" / "notes.txt").write_text("mine")
    with monkeypatch.context() as patch:
        patch.chdir(cache)
        with pytest.raises(FileNotFoundError, match="was not found"):
            load_data("mnist")


def test_image_sets_refuse_what_they_are_not() -> None:
    images, labels = torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="expected uint8 or float32 images"):
        ImageSet(images.double(), labels, ("a", "b"))
    with pytest.raises(ValueError, match="expected 2 int64 labels"):
        ImageSet(images, labels[:1], ("a", "b"))
    with pytest.raises(ValueError, match="labels run from 0 to 1, but there are 1 classes"):
        ImageSet(images, labels, ("a",))
    assert len(ImageSet(images, labels, ("a", "b")).subset([1])) == 1
    projected = ImageSet(torch.rand(2, 1, 3, 3), labels, ("a", "b"))
    before = projected.images.clone()
    projected.batch(slice(None))[0].zero_()
    assert torch.equal(projected.images, before)


def test_masks_and_negative_numbers_mean_what_they_mean_in_torch() -> None:
    images = ImageSet(torch.arange(6).view(6, 1, 1, 1).to(torch.uint8), torch.arange(6), tuple("abcdef"))
    assert images.batch(images.labels > 3)[1].tolist() == [4, 5]
    assert images.subset(images.labels > 3).labels.tolist() == [4, 5]
    assert images.batch([-1, 0])[1].tolist() == [5, 0]


def test_restricted_imagenet_is_read_from_the_hubs_layout(cache: Path) -> None:
    labels = [30, 32, 0, 151, 268, 999, 390, *range(281, 286)] * 2
    pixels = np.full((len(labels), 90, 120, 3), 7, np.uint8)
    write_parquet(cache / "imagenet-1k", pixels, labels)
    (cache / "imagenet-1k" / "test-00000-of-00001.parquet").rename(
        cache / "imagenet-1k" / "validation-00000-of-00001.parquet"
    )
    splits = load_data("restricted-imagenet", root=cache, validation=0.2)
    assert splits.test.shape == (3, 64, 64)
    assert splits.test.classes[:3] == ("dog", "cat", "frog")
    assert splits.test.labels.tolist() == [2, 2, 0, 0, 6, 1, 1, 1, 1, 1] * 2
    assert (splits.test.images == 7).all()
