"""NumPy files: mapped, gathered by batch, and trained on like any other set."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from holdfast import train
from holdfast.data import ImageSet, MappedSet, load_data
from holdfast.data.arrays import read_arrays

RNG = np.random.default_rng(0)


def make(count: int, channels: int = 3, size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    shape = (count, size, size, channels) if channels > 1 else (count, size, size)
    return RNG.integers(0, 256, shape, dtype=np.uint8), RNG.integers(0, 4, count)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_npz_is_read_as_it_is_and_mapped_where_it_can_be(tmp_path: Path, save, channels: int) -> None:
    x, y = make(30, channels)
    save(tmp_path / "a.npz", image=x, label=y)
    found, labels = read_arrays([tmp_path / "a.npz"])
    assert np.array_equal(found, x)
    assert np.array_equal(labels, y)
    assert isinstance(found, np.memmap) == (save is np.savez)


def test_a_pair_of_npy_makes_splits_that_agree_with_the_arrays(tmp_path: Path) -> None:
    x, y = make(40)
    paths = [tmp_path / "x.npy", tmp_path / "y.npy"]
    np.save(paths[0], x)
    np.save(paths[1], y)
    splits = load_data("arrays", train=paths, test=paths)
    assert isinstance(splits.train, MappedSet)
    assert splits.train.shape == (3, 8, 8)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (36, 4, 40)
    images, labels = splits.test.batch([5, 0])
    assert torch.equal((images * 255).round().byte(), torch.from_numpy(x[[5, 0]]).permute(0, 3, 1, 2))
    assert labels.tolist() == y[[5, 0]].tolist()


def test_a_mapped_set_behaves_as_one_in_memory() -> None:
    x, y = make(50)
    labels = torch.from_numpy(y)
    mapped = MappedSet((x[:20], x[20:21], x[21:]), torch.arange(50), labels, tuple("abcd"))
    whole = ImageSet(torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), labels, tuple("abcd"))
    order = torch.from_numpy(RNG.permutation(50))
    for indices in (slice(None), slice(10, 30), order, order[:0], [49, 0, 20]):
        for ours, theirs in zip(mapped.batch(indices), whole.batch(indices), strict=True):
            assert torch.equal(ours, theirs)
    some = order[:17]
    assert torch.equal(mapped.subset(some).batch([3])[0], whole.subset(some).batch([3])[0])
    assert len(mapped.subset(some)) == 17
    assert mapped.shape == whole.shape
    assert len(mapped.batch([])[0]) == len(whole.batch([])[0]) == 0
    with pytest.raises(ValueError, match="do not make one set"):
        MappedSet((x, x[..., :1]), torch.arange(50), labels, tuple("abcd"))


@pytest.mark.parametrize(("version", "parts"), [("1m", ["1m"]), ("20m", ["20m_part1", "20m_part2"])])
def test_generated_cifar10_keeps_the_real_test_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, parts: list[str]
) -> None:
    from holdfast.data.hub import CIFAR10

    real = ImageSet(torch.zeros(7, 3, 32, 32, dtype=torch.uint8), torch.arange(7), tuple(map(str, range(10))))
    monkeypatch.setattr(CIFAR10, "read", lambda self: (real, real))
    (tmp_path / "edm-cifar10").mkdir()
    for part in parts:
        x, y = make(300, size=32)
        np.savez(tmp_path / "edm-cifar10" / f"{part}.npz", image=x, label=y)
    splits = load_data("edm-cifar10", version=version, root=tmp_path, train_size=200)
    small = load_data("edm-cifar10", version=version, root=tmp_path, train_size=50)
    assert torch.equal(splits.test.labels, real.labels)
    assert torch.equal(splits.train.batch(slice(50))[0], small.train.batch(slice(None))[0])  # nested
    assert len(splits.validation) == 30 * len(parts)
    with pytest.raises(FileNotFoundError, match=r"5m\.npz"):
        load_data("edm-cifar10", version="5m", root=tmp_path)


MEASURE = """
import resource, sys
import torch
from holdfast.data import Arrays
from holdfast.data.data import Data

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

torch.ones(1).float().div_(255)
before = peak()
path = sys.argv[1]
images = Arrays(train=[path], test=[path]).load().train
for x, y in images.stream(images.order(0, seed=0).split(256)[:40]):
    assert x.shape[1:] == (3, 32, 32)
print(peak() - before)
"""


def test_a_hundred_thousand_images_are_trained_on_without_holding_them(tmp_path: Path) -> None:
    path = tmp_path / "1m.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (100_000, 32, 32, 3), np.uint8)
    np.savez(path, image=pixels, label=np.arange(100_000) % 10)
    assert path.stat().st_size > 300e6
    command = [sys.executable, "-c", MEASURE, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    megabytes = float(done.stdout)
    # 307 MB of pixels would be 1,229 MB as floats. What was touched of the mapped file counts as held.
    assert megabytes < 450, f"{megabytes} MB"


def test_a_run_trains_on_mapped_files(tmp_path: Path) -> None:
    x, y = make(120, channels=1)
    x[np.arange(120), 0, y] = 255
    np.savez(tmp_path / "a.npz", images=x, labels=y)
    path = f"[{tmp_path / 'a.npz'}]"
    run = train(
        "digits",
        f"data={{name: arrays, train: {path}, test: {path}}}",
        "model={name: mlp, hidden: [8]}",
        "training={epochs: 2, batch_size: 40, augmentations: [{name: crop, padding: 1}]}",
        "evaluation={attacks: [fgsm], curve_points: 0}",
        runs=tmp_path / "runs",
    )
    assert run.result["examples"] == 120


def test_files_that_are_not_what_they_should_be_are_named(tmp_path: Path) -> None:
    x, y = make(10)
    path = tmp_path / "a.npz"
    with pytest.raises(FileNotFoundError, match=r"a\.npz"):
        read_arrays([path])
    np.savez(path, pictures=x, label=y)
    with pytest.raises(ValueError, match=r"holds none of image, images.*it holds pictures, label"):
        read_arrays([path])
    np.savez(path, image=x.astype(float), label=y)
    with pytest.raises(ValueError, match="expected uint8 images"):
        read_arrays([path])
    np.savez(path, image=x, label=y[:3])
    with pytest.raises(ValueError, match="as many integer labels"):
        read_arrays([path])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        read_arrays([path])
    with pytest.raises(ValueError, match=r"one \.npz or two \.npy, given 3"):
        read_arrays([path] * 3)
