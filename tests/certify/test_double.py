"""A network in float64 has the weights that the one in float32 applies, and leaves it as it was."""

import pytest
import torch
from helpers import images
from torch import nn
from torch.nn.utils import parametrizations

from holdfast import Threat
from holdfast.certify import BoundCertifier, LipschitzCertifier
from holdfast.certify.double import in_float64
from holdfast.layers import AOLLinear, BjorckLinear, CayleyLinear
from holdfast.layers.lipschitz import AffineLinear


@pytest.mark.parametrize("layer", [AOLLinear, BjorckLinear, CayleyLinear])
@pytest.mark.parametrize("behind", [False, True])
def test_effective_weights_are_those_of_the_models_own_precision(layer: type[AffineLinear], behind: bool) -> None:
    torch.manual_seed(0)
    first = [parametrizations.weight_norm(nn.Linear(6, 6)), nn.ReLU()] if behind else []
    model = nn.Sequential(*first, layer(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval().requires_grad_(False)
    double, place = in_float64(model, torch.rand(2, 6))
    assert place.dtype == torch.float64
    ours, theirs = (next(m for m in one.modules() if isinstance(m, layer)) for one in (model, double))
    assert torch.equal(ours.effective_weight().double(), theirs.effective_weight())
    if behind:
        assert torch.equal(model[0].weight.double(), double[0].weight)


@pytest.mark.parametrize("certifier", [BoundCertifier(float64="always"), LipschitzCertifier()])
@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_parametrised_model_is_left_as_it_was(
    certifier: BoundCertifier | LipschitzCertifier, wrap: object
) -> None:
    assert callable(wrap)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), wrap(nn.Linear(64, 8)), nn.ReLU(), wrap(nn.Linear(8, 4))).eval()
    (x, _), names = images(4), [name for name, _ in model.named_parameters()]
    y, before = model(x).argmax(1), model(x)
    certifier(model, x, y, Threat("l2", 0.01))
    certifier(model, x, y, Threat("l2", 0.01))
    assert torch.equal(model(x), before)
    assert [name for name, _ in model.named_parameters()] == names
    model.train()
    model(x).sum().backward()


def test_float64_is_itself() -> None:
    model, x = nn.Linear(2, 2).double(), torch.rand(1, 2).double()
    assert in_float64(model, x)[0] is model
