"""Folders of image files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from holdfast import train
from holdfast.data import ImageSet, RestrictedImageNet, load_data
from holdfast.data.folder import FileSet, Listing, list_folder


def write(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (20, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def read(listing: Listing, size: int) -> FileSet:
    return FileSet(listing.files, listing.labels, listing.classes, size, size, workers=2)


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
    assert (read(list_folder(tmp_path), 10).pixels([0]) == 255).all()


def test_classes_can_be_grouped_as_in_restricted_imagenet(tmp_path: Path) -> None:
    for number in range(6):
        write(tmp_path / f"n{number}" / "x.png", (10 * number, 0, 0))
    groups = {"low": range(0, 2), "high": range(4, 6)}
    images = read(list_folder(tmp_path, groups), 8).decoded()
    assert images.classes == ("low", "high")
    assert images.labels.tolist() == [0, 0, 1, 1]
    assert images.images[:, 0, 0, 0].tolist() == [0, 10, 40, 50]
    ranges = RestrictedImageNet.groups.values()
    assert sum(map(len, ranges)) == len({number for numbers in ranges for number in numbers}) == 203
    with pytest.raises(ValueError, match="6 class folders, the groups count on a thousand"):
        list_folder(tmp_path, RestrictedImageNet.groups)


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
        list_folder(folder / "nothing")


def test_a_streamed_folder_gives_what_a_kept_one_gives(folder: Path) -> None:
    kept = load_data("folder", path=folder, size=8).train
    streamed = load_data("folder", path=folder, size=8, stream=True, workers=2).train
    assert isinstance(kept, ImageSet)
    assert isinstance(streamed, FileSet)
    batches = kept.order(3, seed=1).split(7)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for batch, (x, y), (x_kept, y_kept) in zip(
        batches, streamed.stream(batches), kept.stream(batches), strict=True
    ):
        assert torch.equal(x, x_kept)
        assert torch.equal(y, y_kept)
        assert torch.equal(streamed.batch(batch)[0], x)
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(part) for part in streamed.batch([])] == [0, 0]
    assert torch.equal(streamed.subset([5, 2]).batch(slice(None))[0], kept.batch([5, 2])[0])


def test_large_folders_are_streamed_unless_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.data.folder.KEPT_BYTES", 3 * 8 * 8 * 20 - 1)
    assert isinstance(load_data("folder", path=folder, size=8).train, FileSet)
    assert isinstance(load_data("folder", path=folder, size=8, stream=False).train, ImageSet)


def test_a_run_trains_on_a_streamed_folder_to_the_same_weights(folder: Path, tmp_path: Path) -> None:
    runs = []
    for stream in ("false", "true"):
        settings = (
            f"data={{name: folder, path: {folder}, size: 8, stream: {stream}, workers: 2}}",
            "model={name: mlp, hidden: [8]}",
            "training={epochs: 2, batch_size: 7, augmentations: [flip]}",
            "evaluation={attacks: [fgsm], curve_points: 0}",
        )
        runs.append(train("digits", *settings, runs=tmp_path / "runs"))
    kept, streamed = (load_file(run.path / "model.safetensors") for run in runs)
    assert all(torch.equal(streamed[key], value) for key, value in kept.items())


def test_a_damaged_image_stops_a_streamed_run_and_is_named(folder: Path, tmp_path: Path) -> None:
    streamed = load_data("folder", path=folder, size=8, stream=True, workers=1).train
    streamed.files[3].write_bytes(streamed.files[3].read_bytes()[:60])
    with pytest.raises(ValueError, match=rf"{streamed.files[3].name} cannot be read as an image") as caught:
        list(streamed.stream([torch.arange(2), torch.arange(2, 5)]))
    assert isinstance(caught.value, OSError)  # a run in progress ends as with any other fault of the disk


def test_tiny_imagenet_is_read_as_it_is_published(tmp_path: Path) -> None:
    root = tmp_path / "tiny-imagenet-200"
    for label, name in enumerate(("n01", "n02")):
        for number in range(10):
            write(root / "train" / name / "images" / f"{name}_{number}.JPEG", (0, 100 * label, 0), (64, 64))
    for number in range(3):
        write(root / "val" / "images" / f"val_{number}.JPEG", (0, 100 * (number % 2), 0), (64, 64))
    lines = [f"val_{number}.JPEG\tn0{number % 2 + 1}\t0\t0\t62\t62" for number in range(3)]
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    splits = load_data("tiny-imagenet", root=tmp_path)
    assert splits.test.classes == ("n01", "n02")
    assert splits.test.labels.tolist() == [0, 1, 0]
    x, y = splits.test.batch(slice(None))
    assert torch.equal((x[:, 1, 32, 32] > 0.2).long(), y)
    assert len(splits.train) + len(splits.validation) == 20
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn09\n")
    with pytest.raises(ValueError, match="does not name a file and a class of the training part"):
        load_data("tiny-imagenet", root=tmp_path)


def test_sixteen_bits_become_eight(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "a" / "ramp.png")
    pixels = read(list_folder(tmp_path), 8).pixels([0])
    assert np.abs(pixels[0, 0].numpy().astype(float) - ramp / 257).max() <= 1
