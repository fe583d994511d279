"""Real and generated images by share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from holdfast import train
from holdfast.data import Arrays, Digits, ImageSet, MixedSet, Mixture


def image_set(count: int, value: int) -> ImageSet:
    images = torch.full((count, 1, 2, 2), value, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(count) % 256
    return ImageSet(images, torch.arange(count) % 3, tuple("abc"))


@pytest.mark.parametrize(("real", "generated", "share"), [(30, 200, 0.7), (30, 11, 0.7), (40, 7, 0.1), (5, 5, 0.5)])
def test_every_batch_holds_the_share_and_every_epoch_all_real_images(
    real: int, generated: int, share: float
) -> None:
    mixed = MixedSet(image_set(real, 0), image_set(generated, 255), share)
    per_epoch = mixed.epoch_size - real
    assert per_epoch / mixed.epoch_size == pytest.approx(share, abs=0.5 / real)
    seen = []
    for epoch in range(6):
        order = mixed.order(epoch, seed=1)
        assert torch.equal(order[order < real].sort().values, torch.arange(real))
        for batch in order.split(10):
            assert abs((batch >= real).sum() - per_epoch / mixed.epoch_size * len(batch)) <= 1
        seen += (order[order >= real] - real).tolist()
    whole = len(seen) // generated * generated
    counts = np.bincount(seen[:whole], minlength=generated)
    assert (counts == whole // generated).all()  # pass by pass, none before its turn
    assert torch.equal(mixed.order(2, seed=1), mixed.order(2, seed=1))
    assert not torch.equal(mixed.order(2, seed=1), mixed.order(2, seed=2))


def test_batches_come_from_where_their_numbers_say() -> None:
    mixed = MixedSet(image_set(30, 0), image_set(50, 255), 0.5)
    x, y = mixed.batch([31, 2, 79, 29])
    assert (x[:, 0, 1, 1] == torch.tensor([1.0, 0.0, 1.0, 0.0])).all()
    assert (255 * x[:, 0, 0, 0]).round().tolist() == [1, 2, 49, 29]
    assert y.tolist() == [1, 2, 1, 2]
    assert torch.equal(mixed.labels[[31, 2, 79, 29]], y)
    assert torch.equal(mixed.subset([31, 2]).batch(slice(None))[1], torch.tensor([2, 1]))
    assert mixed.subset([0, 1]).order(0, 0).sort().values.tolist() == [0, 1]  # of one kind only
    batches = mixed.order(0, seed=0).split(7)
    for batch, (x, y) in zip(batches, mixed.stream(batches), strict=True):
        assert torch.equal(x, mixed.batch(batch)[0])
        assert torch.equal(y, mixed.labels[batch])


def test_a_run_on_a_mixture_validates_and_tests_on_real_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", image=rng.integers(0, 256, (400, 8, 8), np.uint8), label=np.arange(400) % 10)
    path = tmp_path / "a.npz"
    mixture = Mixture(real=Digits(), generated=Arrays(train=[path], test=[path]), share=0.6, train_size=100)
    splits, alone = mixture.load(), Digits(train_size=100).load()
    assert torch.equal(splits.test.labels, alone.test.labels)
    assert torch.equal(splits.validation.labels, alone.validation.labels)
    assert splits.train.epoch_size == 250
    arrays = f"{{name: arrays, train: [{path}], test: [{path}], train_size: 300}}"
    run = train(
        "digits",
        f"data={{name: mixture, real: digits, generated: {arrays}, share: 0.6, train_size: 100}}",
        "model={name: mlp, hidden: [8]}",
        "training={epochs: 2, batch_size: 50}",
        "evaluation={attacks: [fgsm], curve_points: 0}",
        runs=tmp_path / "runs",
    )
    assert list(run.history["step"]) == [5, 10]
    assert run.result["examples"] == 360


def test_settings_that_would_do_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"real\.train_size would do nothing"):
        Mixture(real=Digits(train_size=10), generated=Digits())
    with pytest.raises(ValueError, match=r"real\.split_seed would do nothing"):
        Mixture(real=Digits(split_seed=10), generated=Digits())
    with pytest.raises(ValueError, match=r"generated\.train_size=9999, but there are 1437"):
        Mixture(real=Digits(), generated=Digits(train_size=9999)).load()
