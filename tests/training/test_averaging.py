"""Averages of weights by their definition, and BatchNorm statistics that fit them."""

from __future__ import annotations

import pytest
import torch
from helpers import small_cnn
from torch import nn

from holdfast.data import ImageSet
from holdfast.training import Averaging, estimate_batch_norm
from holdfast.training.averaging import WeightAverage


@pytest.fixture
def images() -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (60, 1, 8, 8), generator=generator).to(torch.uint8)
    return ImageSet(pixels, torch.randint(0, 4, (60,), generator=generator), tuple("abcd"))


def values(settings: Averaging, series: list[float]) -> float:
    """The average after the parameter took these values, one step each."""
    model = nn.Linear(1, 1, bias=False)
    average = WeightAverage(settings, model)
    for step, value in enumerate(series):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update(model, step / len(series))
    return average.weights["weight"].item()


def test_swa_is_the_mean_from_its_start_on() -> None:
    assert values(Averaging(kind="swa"), [1.0, 2.0, 6.0]) == pytest.approx(3.0)
    assert values(Averaging(kind="swa", start=0.5), [100.0, 100.0, 1.0, 3.0]) == pytest.approx(2.0)


def test_ema_weighs_the_past_less() -> None:
    series = [1.0, 2.0, 4.0, 8.0]
    expected = series[0]
    for count, value in enumerate(series[1:], start=1):
        decay = min(0.3, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * value
    assert values(Averaging(decay=0.3), series) == pytest.approx(expected)
    assert values(Averaging(decay=0.0), series) == pytest.approx(8.0)


def test_batch_norm_statistics_become_those_of_the_images(images: ImageSet) -> None:
    model = small_cnn().train()
    model[1].eval()
    estimate_batch_norm(model, images, 30)
    x, _ = images.batch(slice(None))
    activations = model[0](x)
    parts = activations[images.order(0, 0)].split(30)
    assert torch.allclose(model[1].running_mean, activations.mean((0, 2, 3)), atol=1e-5)
    variance = torch.stack([part.var((0, 2, 3)) for part in parts]).mean(0)
    assert torch.allclose(model[1].running_var, variance, rtol=1e-4)
    assert model[1].momentum == 0.1
    assert model.training
    assert not model[1].training
    estimate_batch_norm(model, images, 1)  # single images have no variance: pairs are taken
    assert not torch.equal(model[1].running_var, torch.ones(6))
    own = model[1].running_mean.clone()
    estimate_batch_norm(model, images.subset([0]), 30)
    assert torch.equal(model[1].running_mean, own)


def test_a_model_borrows_the_average_and_gets_its_own_back(images: ImageSet) -> None:
    model = small_cnn()
    average = WeightAverage(Averaging(kind="swa"), model)
    average.update(model, 0.0)
    with torch.no_grad():
        model[6].weight.add_(1)
    average.update(model, 0.5)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    with average.in_place(model, images, 20):
        assert torch.allclose(model[6].weight, own["6.weight"] - 0.5, atol=1e-6)
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
