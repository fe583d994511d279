"""Architectures: published parameter counts, any size, normalisation first."""

from __future__ import annotations

import pytest
import torch

from holdfast.layers import Normalize
from holdfast.models import Model, build

NAMES = sorted(Model.registry)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 20)])
def test_every_model_takes_any_size_and_number_of_classes(name: str, shape: tuple[int, int, int]) -> None:
    model = build(name, input_shape=shape, num_classes=7)
    assert model(torch.rand(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("cnn-small", (1, 28, 28), 166_406),
        ("cnn-small", (3, 32, 32), 214_918),
        ("cnn-4c3f", (1, 28, 28), 1_974_762),
        ("cnn-4c3f", (3, 32, 32), 2_466_858),
        ("mlp", (1, 28, 28), 784 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, shape: tuple[int, int, int], count: int) -> None:
    model = build(name, input_shape=shape, num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == count


def test_normalisation_is_the_first_layer() -> None:
    settings = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}
    model = build("mlp", input_shape=(3, 4, 4), num_classes=2, normalize=settings)
    x = torch.rand(5, 3, 4, 4)
    assert isinstance(model[0], Normalize)
    mean, std = (torch.tensor(settings[k]).view(3, 1, 1) for k in ("mean", "std"))
    assert torch.allclose(model[0](x), (x - mean) / std)
    assert torch.allclose(model(x), model[1:]((x - mean) / std))


def test_what_cannot_be_built_is_named() -> None:
    with pytest.raises(ValueError, match="did you mean 'cnn-small'"):
        build("cnn-smal", input_shape=(1, 8, 8), num_classes=2)
    with pytest.raises(ValueError, match="normalize has 1 channels, the images 3"):
        build("mlp", input_shape=(3, 4, 4), num_classes=2, normalize={"mean": [0], "std": [1]})
    with pytest.raises(ValueError, match="too small"):
        build("cnn-small", input_shape=(1, 2, 2), num_classes=2)
    with pytest.raises(ValueError, match="positive std"):
        Normalize([0.0], [0.0])
    with pytest.raises(ValueError, match="greater than 0"):
        build("mlp", input_shape=(1, 8, 8), num_classes=2, hidden=[0])
