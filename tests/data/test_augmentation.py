"""Augmentation: the contract of every member, and what each does to a known image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from holdfast.data.augmentation import (
    Augmentation,
    Crop,
    Erase,
    Flip,
    GaussianNoise,
    Mixup,
    NinetyFourPercent,
    probabilities,
)

NAMES = sorted(Augmentation.registry)
every_augmentation = pytest.mark.parametrize("augment", [Augmentation.registry[n]() for n in NAMES], ids=NAMES)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(count: int = 64) -> tuple[Tensor, Tensor]:
    generator = seeded(9)
    return torch.rand(count, 3, 32, 32, generator=generator), torch.randint(0, 10, (count,), generator=generator)


@every_augmentation
def test_it_is_seeded_keeps_shapes_and_touches_neither_input_nor_global_state(augment: Augmentation) -> None:
    x, y = batch()
    before, state = x.clone(), torch.get_rng_state()
    one, labels = augment(x, y, seeded())
    assert torch.equal(one, augment(x, y, seeded())[0])
    assert not torch.equal(one, augment(x, y, seeded(1))[0])
    assert one.shape == x.shape
    assert one.dtype == x.dtype
    assert len(labels) == len(y)
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    if "gaussian" not in augment.name:
        assert (one >= 0).all()
        assert (one <= 1).all()


@every_augmentation
def test_every_image_of_a_batch_gets_its_own_draw(augment: Augmentation) -> None:
    # The data-scaling line drew one crop, flip and square for a whole batch.
    x, y = batch()
    same = x[:1].expand(64, -1, -1, -1).clone()
    out, _ = augment(same, y, seeded())
    if augment.name != "mixup":  # mixing equal images gives that image
        assert len({image.numpy().tobytes() for image in out}) > 1


def test_flip_flips_about_half_and_only_left_and_right() -> None:
    x, y = batch(400)
    out, _ = Flip()(x, y, seeded())
    flipped = torch.tensor([torch.equal(a, b.flip(2)) for a, b in zip(out, x, strict=True)])
    kept = torch.tensor([torch.equal(a, b) for a, b in zip(out, x, strict=True)])
    assert (flipped ^ kept).all()
    assert 0.4 < flipped.float().mean() < 0.6


@pytest.mark.parametrize(
    ("mode", "torch_mode"), [("zeros", "constant"), ("reflect", "reflect"), ("edge", "replicate")]
)
def test_a_crop_is_a_window_of_the_padded_image(mode: str, torch_mode: str) -> None:
    x, y = batch(200)
    out, _ = Crop(padding=2, mode=mode)(x, y, seeded())
    padded = torch.nn.functional.pad(x, [2] * 4, mode=torch_mode)
    windows = [padded[:, :, r : r + 32, c : c + 32] for r in range(5) for c in range(5)]
    matches = torch.stack([(window == out).flatten(1).all(1) for window in windows])
    assert matches.any(0).all()
    assert (matches.sum(1) > 0).all()  # every offset occurs


def test_erase_makes_exactly_one_square_of_the_colour() -> None:
    x, y = batch(300)
    out, _ = Erase(size=8, value=[0.1, 0.2, 0.3])(x, y, seeded())
    changed = (out != x).any(1)
    assert (changed.flatten(1).sum(1) == 64).all()
    assert (changed.any(1).sum(1) == 8).all()
    assert (changed.any(2).sum(1) == 8).all()
    assert torch.equal(out[0][:, changed[0]][:, 0], torch.tensor([0.1, 0.2, 0.3]))
    assert changed.any(0).any(0).all()  # squares reach every border
    assert changed.any(0).any(1).all()
    with pytest.raises(ValueError, match="does not fit"):
        Erase(size=40)(x, y, seeded())
    with pytest.raises(ValueError, match="does not fit"):
        Erase(value=[0.1, 0.2])(x, y, seeded())


def test_noise_has_its_standard_deviation() -> None:
    x, y = batch()
    difference = GaussianNoise(sigma=0.25)(x, y, seeded())[0] - x
    assert difference.std().item() == pytest.approx(0.25, rel=0.01)
    assert difference.mean().item() == pytest.approx(0, abs=0.003)


def test_mixup_mixes_images_and_labels_alike() -> None:
    x, y = batch(200)
    out, labels = Mixup(alpha=1.0)(x, y, seeded())
    assert torch.allclose(labels.sum(1), torch.ones(200))
    share = labels.gather(1, y[:, None]).squeeze(1)
    two = (labels > 0).sum(1) == 2
    assert two.float().mean() > 0.7
    assert 0.2 < share[two].mean() < 0.8
    for i in two.nonzero().squeeze(1)[:20].tolist():
        rest = (out[i] - share[i] * x[i]) / (1 - share[i])
        assert min((rest - other).abs().max().item() for other in x) < 1e-3


def test_the_preset_is_crop_flip_and_square() -> None:
    x, y = batch()
    out, labels = NinetyFourPercent()(x, y, seeded())
    mean = torch.tensor([0.491, 0.482, 0.447]).view(1, 3, 1, 1)
    assert ((out == mean).all(1).flatten(1).sum(1) == 64).all()
    assert torch.equal(labels, y)


def test_probabilities_of_labels_and_of_probabilities() -> None:
    assert probabilities(torch.tensor([1]), 3).tolist() == [[0, 1, 0]]
    mixed = torch.tensor([[0.5, 0.5]])
    assert probabilities(mixed, 2) is mixed
