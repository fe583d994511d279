"""CPL and SLL layers against the original arrays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from holdfast.layers import CPLConv2d, CPLLinear, SLLConv2d, SLLLinear

Reference = Callable[[str], dict[str, Tensor]]


def close(found: Tensor, expected: Tensor, atol: float = 1e-9) -> bool:
    return torch.allclose(found, expected.double(), rtol=0, atol=atol)


@pytest.mark.parametrize("case", ["c3", "c1", "lin"])
def test_cpl(case: str, reference: Reference) -> None:
    """Three training steps on the same weights, their power iteration and gradients, then eval mode.

    The original adds the bias once more, after the transposed map; it is taken out of its outputs here.
    """
    arrays = {key: value.double() for key, value in reference("intriguing_cpl").items()}
    weight, bias, x = (arrays[f"{case}_{name}"] for name in ("weight", "bias", "x"))
    layer = CPLLinear(6, 6) if case == "lin" else CPLConv2d(weight.shape[1], weight.shape[0], weight.shape[2])
    layer.double().load_state_dict({"weight": weight, "bias": bias, "_extra_state": arrays[f"{case}_u0"]})
    shaped = bias.view(-1, *[1] * (x.dim() - 2))
    layer.train()
    for step in (1, 2, 3):
        y = layer(x)
        extra = arrays[f"{case}_train{step}_rescaling"] * shaped
        assert close(y, arrays[f"{case}_train{step}_y"] + extra)
        assert close(layer.power_vector, arrays[f"{case}_train{step}_u"])
        if step == 1:
            cotangent = arrays[f"{case}_train1_cotangent"]
            # The second bias depends on the weight by its rescaling, and on the bias.
            sigma = 1 / (arrays[f"{case}_train1_rescaling"] / 2).sqrt()
            (y * cotangent).sum().backward()
            second = (cotangent * shaped).sum()
            v, u = arrays[f"{case}_train1_v"], arrays[f"{case}_train1_u"]
            through = torch.zeros_like(weight, requires_grad=True)
            applied = (
                torch.nn.functional.linear(u, weight + through)
                if case == "lin"
                else torch.nn.functional.conv2d(u, weight + through, padding=weight.shape[2] // 2)
            )
            of_rescaling = torch.autograd.grad((v * applied).sum(), through)[0] * (-4 / sigma**3)
            assert close(layer.weight.grad - second * of_rescaling, arrays[f"{case}_train1_grad_weight"], 1e-8)
            axes = [0, *range(2, x.dim())]
            own = cotangent.sum(axes) * arrays[f"{case}_train1_rescaling"]
            assert close(layer.bias.grad - own, arrays[f"{case}_train1_grad_bias"])
    layer.eval()
    assert close(layer(x), arrays[f"{case}_eval_y"] + arrays[f"{case}_eval_rescaling"] * shaped, 2e-8)
    assert close(layer.power_vector, arrays[f"{case}_eval_u_training_after"])


@pytest.mark.parametrize("case", ["", "k1_"])
def test_sll_convolutions(case: str, reference: Reference) -> None:
    arrays = {key: value.double() for key, value in reference("intriguing_llc_sll").items()}
    kernel = arrays[f"{case}kernel"]
    layer = SLLConv2d(kernel.shape[1], kernel.shape[0], kernel.shape[2]).double()
    layer.load_state_dict({"weight": kernel, "bias": arrays[f"{case}bias"], "q": arrays[f"{case}q"]})
    assert close(layer.derived(), arrays[f"{case}rescaling"])
    assert close(layer(arrays[f"{case}x"]), arrays[f"{case}y"])


def test_sll_dense_layers(reference: Reference) -> None:
    """The original's hidden width is free; ours is the larger of the two, so zeros fill the rest of its weight.

    Its dense layer keeps q from 0 in another way than its convolution, which is 1e-6 of a difference.
    """
    arrays = {key: value.double() for key, value in reference("intriguing_llc_sll").items()}
    weight, x = arrays["lin_weight"], arrays["lin_x"]
    layer = SLLLinear(5, 7).double()
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[:, :5] = weight
        layer.bias.copy_(arrays["lin_bias"])
        layer.q.copy_(arrays["lin_q"])
    assert close(layer(x)[:, :5], arrays["lin_y"], 5e-6)


def test_images_larger_than_what_is_taken_exactly_are_bounded_from_above() -> None:
    torch.manual_seed(0)
    layer = CPLConv2d(8, 8).eval()
    size = (24, 24)
    sigma = layer.norm(size)
    x = torch.randn(1, 8, *size)
    for _ in range(200):
        forward, adjoint = layer.maps()
        with torch.no_grad():
            x = adjoint(forward(x))
            x = x / x.norm()
    found = forward(x).norm()
    assert found <= sigma <= 1.02 * found
