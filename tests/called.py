"""A function of feature maps inside a small network, and whether bounds of it hold and lose nothing at a point."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from holdfast import Threat
from holdfast.bounds import bound_margins, bound_outputs, trace

SHAPE = (4, 6, 6)
"""Of the feature maps."""
METHODS = ("ibp", "crown-ibp", "crown")


class Called(nn.Module):
    """A convolution, a ReLU, the function, a dense layer; in float64."""

    def __init__(self, function: Callable[..., Tensor], seed: int = 0) -> None:
        super().__init__()
        self.function = function
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(1, SHAPE[0], 3, padding=1, dtype=torch.float64)
            with torch.no_grad():
                entries = function(torch.zeros(2, *SHAPE, dtype=torch.float64)).flatten(1).shape[1]
            self.head = nn.Linear(entries, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        z = self.stem(x)
        return self.head(self.function(torch.cat([z[:, :2], torch.relu(z[:, 2:])], 1)).flatten(1))


def inputs(seed: int = 0, n: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, *SHAPE[1:], generator=generator, dtype=torch.float64)


def holds(function: Callable[..., Tensor], threat: Threat = Threat("linf", 0.1), margins: bool = True) -> None:  # noqa: B008
    """By each method: exact at a point; around it, no sampled input and no corner leaves the bounds."""
    model, x = Called(function).eval(), inputs()
    y = torch.tensor([0, 1, 2])
    exact, others = model(x), torch.tensor([[1, 2], [0, 2], [0, 1]])
    for method in METHODS:
        lower, upper = bound_outputs(model, x, threat.with_eps(0.0), method, arithmetic=None)
        assert torch.allclose(lower, exact, atol=1e-9), method
        assert torch.allclose(upper, exact, atol=1e-9), method
        lower, upper = bound_outputs(model, x, threat, method)
        least = bound_margins(model, x, y, threat, method)
        assert lower.isfinite().all()
        generator = torch.Generator().manual_seed(1)
        for draw in range(60):
            noise = torch.rand(x.shape, generator=generator, dtype=torch.float64) * 2 - 1
            noise = noise.sign() if draw % 2 else noise
            logits = model(threat.project(x, x + threat.eps * noise))
            assert (lower <= logits).all(), method
            assert (logits <= upper).all(), method
            assert (least <= logits.gather(1, y[:, None]) - logits.gather(1, others)).all(), method


def same_when_exported(function: Callable[..., Tensor]) -> None:
    """The graph of torch.export is bounded as the module is."""
    model, x = Called(function).eval(), inputs()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    bounds = [bound_outputs(net, x, Threat("linf", 0.1), "ibp") for net in (model, program.module())]
    for one, other in zip(*bounds, strict=True):
        assert torch.allclose(one, other, atol=1e-9)


def operators(function: Callable[..., Tensor]) -> list[str]:
    """The kinds between the network's relu and its dense layer, by name."""
    nodes = trace(Called(function).eval(), inputs()).nodes
    return [type(node.operator).__name__ for node in nodes]
