"""Averages of weights by their definition, and BatchNorm statistics that fit them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import small_cnn
from torch import nn

from holdfast.data import ImageSet
from holdfast.inference import eval_mode
from holdfast.layers import BatchCentering
from holdfast.training import Averaging, estimate_batch_norm
from holdfast.training.averaging import Forward, WeightAverage


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


def batches(images: ImageSet, size: int) -> list[Forward]:
    return [lambda model, part=part: model(part) for part in images.batch(slice(None))[0].split(size)]


def test_batch_norm_statistics_become_those_of_the_batches(images: ImageSet) -> None:
    model = small_cnn().eval()
    model[1].train()
    estimate_batch_norm(model, batches(images, 25))
    parts = model[0](images.batch(slice(None))[0]).split(25)
    assert torch.allclose(model[1].running_mean, torch.stack([p.mean((0, 2, 3)) for p in parts]).mean(0), atol=1e-5)
    assert torch.allclose(model[1].running_var, torch.stack([p.var((0, 2, 3)) for p in parts]).mean(0), rtol=1e-4)
    assert model[1].momentum == 0.1
    assert model[1].training
    assert not model.training
    assert not model[5].training
    own = model[1].running_mean.clone()
    estimate_batch_norm(model, [])
    assert torch.equal(model[1].running_mean, own)


def test_estimating_leaves_all_but_the_statistics_alone(images: ImageSet) -> None:
    """Dropout draws, gradients are asked for, and a layer that stays in eval mode keeps its statistics."""

    class Frozen(nn.BatchNorm2d):
        def train(self, mode: bool = True) -> Frozen:
            return super().train(False)

    model = nn.Sequential(Frozen(1), BatchCentering(1), *small_cnn()).train()
    model[0].running_mean.fill_(0.3)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    state, x = torch.get_rng_state(), images.batch(slice(None))[0]
    with torch.no_grad():
        estimate_batch_norm(model, batches(images, 30))
    assert torch.equal(torch.get_rng_state(), state)
    assert model[0].running_mean == 0.3
    assert int(model[0].num_batches_tracked) == 0
    assert int(model[3].num_batches_tracked) == 0  # counts steps of the training
    centred = (x - 0.3) / (1 + 1e-5) ** 0.5
    assert model[1].running_mean.item() == pytest.approx(centred.mean().item(), abs=1e-5)
    assert model[1].momentum == 0.1
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert parameter.grad is None


def test_an_eval_pass_on_the_way_sees_what_was_estimated_so_far(images: ImageSet) -> None:
    model = nn.Sequential(nn.BatchNorm2d(1))
    model[0].running_mean.fill_(9.0)
    seen: list[float] = []

    def forward(model: nn.Module) -> None:
        seen.append(model[0].running_mean.item())
        with eval_mode(model):
            model(torch.full((2, 1, 8, 8), 100.0))
        model(torch.full((2, 1, 8, 8), float(len(seen))))

    estimate_batch_norm(model, [forward] * 3)
    assert seen == pytest.approx([9.0, 1.0, 1.5])
    assert model[0].running_mean.item() == pytest.approx(2.0)


def test_a_model_borrows_the_average_and_gets_its_own_back(images: ImageSet) -> None:
    model = small_cnn()
    average = WeightAverage(Averaging(kind="swa"), model)
    average.update(model, 0.0)
    with torch.no_grad():
        model[6].weight.add_(1)
    average.update(model, 0.5)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    with average.in_place(model, partial(estimate_batch_norm, forwards=batches(images, 20))):
        assert not torch.equal(model[1].running_mean, own["1.running_mean"])
        assert torch.allclose(model[6].weight, own["6.weight"] - 0.5, atol=1e-6)
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
