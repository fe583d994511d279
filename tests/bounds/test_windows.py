"""Convolutions and poolings as functions: bounds hold, and are those of the modules of the same name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from called import Called, holds, inputs, same_when_exported
from torch import Tensor, nn

from holdfast import Threat
from holdfast.bounds import UnsupportedOperator, bound_margins, trace
from holdfast.bounds.operators import MaxPool
from holdfast.certify import LipschitzCertifier

GENERATOR = torch.Generator().manual_seed(5)
ONE = torch.randn(8, 2, 3, generator=GENERATOR, dtype=torch.float64)
TWO = torch.randn(6, 2, 3, 3, generator=GENERATOR, dtype=torch.float64)
BIAS = torch.randn(8, generator=GENERATOR, dtype=torch.float64)

WINDOWS: dict[str, Callable[[Tensor], Tensor]] = {
    "conv1d": lambda z: F.conv1d(z.flatten(2), ONE, BIAS, 2, padding=1, groups=2),
    "conv2d, same": lambda z: F.conv2d(z, TWO, padding="same", dilation=2, groups=2),
    "conv2d, valid": lambda z: torch.conv2d(z, TWO, BIAS[:6], padding="valid", stride=(2, 1), groups=2),
    "conv_transpose1d": lambda z: F.conv_transpose1d(z.flatten(2), ONE[:4], BIAS[:2], stride=2),
    "conv_transpose2d": lambda z: F.conv_transpose2d(z, TWO[:4], None, 2, 1, 1),
    "max_pool1d": lambda z: F.max_pool1d(z.flatten(2), 3, 2, 1),
    "max_pool2d, with places": lambda z: F.max_pool2d(z, 2, return_indices=True)[0],
    "max_pool2d, overlapping": lambda z: F.max_pool2d(z, 3, stride=1, padding=1),
    "adaptive_max_pool1d": lambda z: F.adaptive_max_pool1d(z.flatten(2), 5),
    "adaptive_max_pool2d, uneven": lambda z: F.adaptive_max_pool2d(z, (4, 5)),
    "avg_pool1d": lambda z: F.avg_pool1d(z.flatten(2), 4, 2, 1),
    "adaptive_avg_pool1d": lambda z: F.adaptive_avg_pool1d(z.flatten(2), 7),
    "adaptive_avg_pool2d": lambda z: F.adaptive_avg_pool2d(z, (2, None)),
    "interpolate": lambda z: F.interpolate(z, scale_factor=2, mode="bilinear"),
    "amax": lambda z: z.amax((2, 3)),
    "amax over channels": lambda z: torch.amax(z, 1, keepdim=True),
    "amin": lambda z: z.amin(dim=(1, -1)),
    "max along a dimension": lambda z: z.max(1)[0] + z.max(dim=1).values,
    "min along a dimension": lambda z: torch.min(z, -1, keepdim=True).values,
}


@pytest.mark.parametrize("function", WINDOWS.values(), ids=WINDOWS.keys())
def test_bounds_hold_and_are_exact_at_a_point(function: Callable[[Tensor], Tensor]) -> None:
    holds(function)


@pytest.mark.parametrize("name", [name for name in WINDOWS if name != "interpolate"])
def test_in_graphs_of_torch_export_they_are_the_same(name: str) -> None:
    same_when_exported(WINDOWS[name])


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("name", ["conv1d", "conv_transpose2d", "amax", "adaptive_max_pool2d, uneven"])
def test_in_other_norms(name: str, norm: str) -> None:
    holds(WINDOWS[name], Threat(norm, 0.3))


TWINS: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
    "AdaptiveMaxPool2d": (nn.AdaptiveMaxPool2d((4, 3)), lambda z: F.adaptive_max_pool2d(z, (4, 3))),
    "MaxPool2d": (nn.MaxPool2d(3, 2, 1), lambda z: F.max_pool2d(z, 3, 2, 1)),
    "AvgPool2d": (nn.AvgPool2d(3, 2), lambda z: F.avg_pool2d(z, 3, 2)),
    "Unfold": (nn.Unfold(2, 1, 1, 2), lambda z: F.unfold(z, 2, padding=1, stride=2)),
    "ChannelShuffle": (nn.ChannelShuffle(2), lambda z: F.channel_shuffle(z, 2)),
}


class Module(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, z: Tensor) -> Tensor:
        return self.module(z)


@pytest.mark.parametrize(("module", "function"), TWINS.values(), ids=TWINS.keys())
@pytest.mark.parametrize("method", ["ibp", "crown", "lmt"])
def test_a_module_is_its_function(module: nn.Module, function: Callable[[Tensor], Tensor], method: str) -> None:
    x, y, threat = inputs(), torch.tensor([0, 1, 2]), Threat("l2", 0.1)
    one, other = (bound_margins(Called(f).eval(), x, y, threat, method) for f in (Module(module), function))
    assert torch.equal(one, other)


def test_adaptive_windows_that_share_entries_have_the_lipschitz_constant_of_their_overlap() -> None:
    def overlap(size: int | tuple[int, int]) -> int | None:
        nodes = trace(Called(lambda z: F.adaptive_max_pool2d(z, size)).eval(), inputs()).nodes
        return next(node.operator.overlap for node in nodes if isinstance(node.operator, MaxPool))

    assert [overlap(size) for size in (1, 2, 3, 6, 4, (4, 5), 7)] == [1, 1, 1, 1, 4, 4, 4]
    x = inputs()
    model = Called(lambda z: F.adaptive_max_pool2d(z, 4)).eval()
    y, threat = model(x).argmax(1), Threat("l2", 0.05)
    certificate = LipschitzCertifier()(model, x, y, threat)
    assert certificate.radius is not None
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        noise = noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * certificate.radius.view(-1, 1, 1, 1)
        assert (model(x + noise).argmax(1) == y).all()


def test_places_of_the_largest_entries_and_bicubic_weights_are_refused() -> None:
    for function, message in (
        (lambda z: F.max_pool2d(z, 2, return_indices=True)[1].double(), "where the largest entries are"),
        (lambda z: z.max(1)[1].double(), "where the largest entries are"),
        (lambda z: F.interpolate(z, scale_factor=2, mode="bicubic"), "negative weights"),
    ):
        with pytest.raises(UnsupportedOperator, match=message):
            trace(Called(function).eval(), inputs())
