"""Architectures: published parameter counts, any size, normalisation first."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from holdfast import Threat
from holdfast.bounds import bound_outputs
from holdfast.layers import Normalize
from holdfast.models import Model, build
from holdfast.models.model import Shape

NAMES = sorted(set(Model.registry) - {"timm", "factory", "onnx", "torch-export", "torchscript"})
LARGE = {"resnet101", "resnet152", "wrn-28-10", "wrn-34-10", "wrn-40-10", "wrn-70-16"}


@pytest.mark.parametrize("name", sorted(set(NAMES) - LARGE))
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 44), (2, 96, 64)])
def test_every_model_takes_any_size_and_number_of_classes(name: str, shape: tuple[int, int, int]) -> None:
    settings = {"depth": 10, "width": 1} if name == "wide-resnet" else {"width": 4} if "simple" in name else {}
    model = build(name, input_shape=shape, num_classes=7, **settings).eval()
    with torch.no_grad():
        assert model(torch.rand(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("cnn-small", (1, 28, 28), 166_406),
        ("cnn-small", (3, 32, 32), 214_918),
        ("cnn-4c3f", (1, 28, 28), 1_974_762),
        ("cnn-4c3f", (3, 32, 32), 2_466_858),
        ("cnn-6c2f", (3, 32, 32), 2_250_378),
        ("cnn-4layer", (3, 32, 32), 2_466_858),
        ("dm-large", (1, 28, 28), 13_257_290),
        ("dm-large", (3, 32, 32), 17_190_602),
        ("cnn001", (1, 28, 28), 1_199_882),
        ("cnn002", (1, 28, 28), 312_202),
        ("simple-conv-net", (3, 32, 32), 4_692_416),
        ("vgg11-bn", (3, 32, 32), 9_231_114),
        ("preact-resnet18", (3, 32, 32), 11_172_170),
        ("preact-resnet18", (3, 160, 160), 11_179_850),
        ("resnet101", (3, 64, 64), 42_518_601 + 2049),
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
    assert torch.allclose(model(x), model.network((x - mean) / std))


def initialise(model: nn.Module, first: int = 1000) -> nn.Module:
    """The weights with which the reference logits were computed: drawn key by key, BatchNorm near the identity."""
    state = {}
    number = first
    for key, value in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        draw = np.random.RandomState(number).standard_normal(value.shape)
        number += 1
        if value.dim() > 1:
            draw = draw * np.sqrt(2 / np.prod(value.shape[1:]))
        elif "running_mean" in key or not key.endswith(("running_var", "weight")):
            draw = 0.05 * draw
        else:
            draw = 1 + 0.1 * (np.abs(draw) if "running_var" in key else draw)
        state[key] = torch.from_numpy(np.asarray(draw, dtype=np.float32))
    model.load_state_dict(state, strict=False)
    return model.eval()


@pytest.mark.parametrize(
    ("original", "name", "shape", "classes"),
    [
        ("CNN001", "cnn001", (1, 28, 28), 10),
        ("CNN002", "cnn002", (1, 28, 28), 10),
        ("WRN_40_10", "wrn-40-10", (3, 32, 32), 10),
        ("ResNet50", "resnet50", (3, 64, 64), 9),
        ("ResNet152", "resnet152", (3, 64, 64), 9),
    ],
)
def test_logits_equal_the_local_lipschitz_line(
    reference: Callable[[str], dict[str, Tensor]], original: str, name: str, shape: Shape, classes: int
) -> None:
    # The original's WRN-40-10 has 2,563,552 more weights in a group that its forward never reads.
    arrays = reference("lolip_architectures")
    model = initialise(build(name, input_shape=shape, num_classes=classes))
    assert sum(p.numel() for p in model.parameters()) == arrays[f"{original}_n_params_used"]
    x = torch.from_numpy(np.random.RandomState(42).rand(2, *shape).astype(np.float32))
    with torch.no_grad():
        assert torch.allclose(model(x), arrays[f"{original}_logits"], rtol=1e-5, atol=1e-4)


def test_the_last_layer_of_cnn002_starts_at_zero() -> None:
    model = build("cnn002", input_shape=(1, 28, 28), num_classes=10)
    x = torch.rand(2, 1, 28, 28, requires_grad=True)
    assert torch.autograd.grad(model(x).sum(), x)[0].abs().max() == 0


@pytest.mark.parametrize("name", ["cnn-small", "cnn-4c3f", "cnn7", "vgg11-bn", "preact-resnet18", "wide-resnet"])
def test_bounds_understand_the_networks(name: str) -> None:
    settings = {"depth": 10, "width": 1} if name == "wide-resnet" else {}
    model = build(name, input_shape=(3, 32, 32), num_classes=4, **settings).eval()
    x, threat = torch.rand(2, 3, 32, 32), Threat("linf", 1e-4)
    lower, upper = bound_outputs(model, x, threat)
    with torch.no_grad():
        assert (lower <= model(x)).all()
        assert (model(x) <= upper).all()


def test_other_peoples_networks_come_by_name() -> None:
    path = "holdfast.models:build"
    model = build(path, input_shape=(1, 8, 8), num_classes=3, arguments={"name": "mlp", "hidden": [5]})
    assert next(model.parameters()).shape == (5, 64)
    with pytest.raises(ValueError, match="cannot be imported: No module named 'nowhere'"):
        build("nowhere.at:all", input_shape=(1, 8, 8), num_classes=3)
    with pytest.raises(ValueError, match="cannot be imported"):
        build("holdfast.models:nothing", input_shape=(1, 8, 8), num_classes=3)
    with pytest.raises(ValueError, match="not a module"):
        build("builtins:dict", input_shape=(1, 8, 8), num_classes=3)


def test_timm_is_asked_for_only_when_named() -> None:
    code = "import sys, holdfast.models; assert 'timm' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert Model.parse("timm:resnet18").architecture == "resnet18"


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
    for name in ("vgg11-bn", "cnn001", "cnn002", "simple-conv-net"):
        with pytest.raises(ValueError, match="too small"):
            build(name, input_shape=(1, 4, 4), num_classes=2)
    with pytest.raises(ValueError, match="6 n \\+ 4"):
        build("wide-resnet", input_shape=(3, 32, 32), num_classes=2, depth=12)
