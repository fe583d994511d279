"""Short runs on the real data sets below HOLDFAST_DATA; collected only where that is set."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast import train
from holdfast.data import load_data


def test_mnist_is_read_whole_and_in_order() -> None:
    splits = load_data("mnist", validation=0.05)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [57000, 3000, 10000]
    assert splits.test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    x, _ = splits.test.batch([0])
    assert x.shape == (1, 1, 28, 28)
    assert x.sum().item() == pytest.approx(72.3, abs=0.1)


def test_cifar10_has_colours_and_names() -> None:
    splits = load_data("cifar10", train_size=1000)
    assert splits.train.shape == (3, 32, 32)
    assert "frog" in splits.train.classes
    assert splits.train.labels.bincount().tolist() == pytest.approx([100] * 10, abs=3)


def test_certified_training_on_a_part_of_mnist(tmp_path: Path) -> None:
    run = train(
        "mnist-ibp",
        "data.train_size=6000",
        "training.epochs=5",
        "training.batch_size=64",
        "evaluation.examples=500",
        "evaluation.attacks=[{name: pgd, steps: 20}]",
        "evaluation.certifiers=[{name: bounds, method: ibp}]",
        "evaluation.curve_points=0",
        runs=tmp_path,
    )
    result = run.result
    assert result["standard"] > 0.9
    assert result["certified"]["bounds"] > 0.6
    assert result["certified"]["bounds"] <= result["attacked"]["pgd"] <= result["standard"]


def test_a_wide_resnet_learns_cifar10_with_augmentation(tmp_path: Path) -> None:
    run = train(
        "mnist-trades",
        "data={name: cifar10, train_size: 3000}",
        "model={name: wide-resnet, depth: 10, width: 1}",
        "threat=linf:2/255",
        "objective=cross-entropy",
        "optimizer={name: sgd, lr: 0.1}",
        "schedule=one-cycle",
        "training={epochs: 3, batch_size: 100, augmentations: [flip, {name: crop, mode: reflect}]}",
        "evaluation={examples: 500, attacks: [fgsm], certifiers: [], curve_points: 0}",
        runs=tmp_path,
    )
    result = run.result
    assert 0.25 < result["standard"] < 0.7
    assert result["attacked"]["fgsm"] < result["standard"]
    assert run.history["loss"].iloc[-1] < run.history["loss"].iloc[0] - 0.1
