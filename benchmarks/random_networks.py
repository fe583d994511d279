"""Small random networks of many structures, near their class boundaries, in float32 or float64.

Beside layers of affine pieces: smooth functions, products and quotients, softmax, LayerNorm and attention.
What naive bounds get wrong: weights and biases over 2^±20, large biases that round the rest away and cancel later,
BatchNorm of large running means, inputs closer to an edge than their spacing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from exact import Residual
from exact_smooth import SMOOTH, Attention, Squared, Turned
from torch import Tensor, nn

from holdfast.layers import Abs, MaxMin, Normalize


class Draw:
    """What a batch is drawn with: numbers of one seed, in one precision."""

    def __init__(self, seed: int, number: int) -> None:
        self.rng = np.random.default_rng([seed, number])
        self.dtype = self.one_of((torch.float32, torch.float64))

    def one_of(self, choices: tuple[Any, ...]) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def integer(self, low: int, high: int) -> int:
        """Both ends included."""
        return int(self.rng.integers(low, high + 1))

    def power(self, low: float, high: float) -> float:
        """2 to a number drawn in between."""
        return float(2 ** self.rng.uniform(low, high))

    def normal(self, *shape: int) -> Tensor:
        return self.rounded(torch.from_numpy(self.rng.standard_normal(shape)))

    def rounded(self, values: Tensor) -> Tensor:
        """To the precision of the batch, still in float64."""
        return values.to(self.dtype).double()

    @property
    def digits(self) -> int:
        return 24 if self.dtype == torch.float32 else 53


def activation(draw: Draw) -> nn.Module:
    return draw.one_of((nn.ReLU(), nn.ReLU(), nn.LeakyReLU(0.125), nn.Hardtanh(-1.0, 1.0), Abs()))


def linear(draw: Draw) -> tuple[nn.Sequential, tuple[int, ...]]:
    entries = draw.one_of((1, 2, 5, 12, 30, 100, 784))
    return nn.Sequential(nn.Linear(entries, draw.integer(2, 4))), (entries,)


def deep_linear(draw: Draw) -> tuple[nn.Sequential, tuple[int, ...]]:
    width, entries = draw.integer(1, 8), draw.integer(1, 12)
    inner = [nn.Linear(width, width) for _ in range(draw.integer(0, 2))]
    return nn.Sequential(nn.Linear(entries, width), *inner, nn.Linear(width, draw.integer(2, 3))), (entries,)


def dense(draw: Draw) -> tuple[nn.Sequential, tuple[int, ...]]:
    entries, widths = draw.integer(1, 12), [draw.integer(1, 8) for _ in range(draw.integer(1, 3))]
    layers: list[nn.Module] = []
    for before, after in zip([entries, *widths], widths, strict=False):
        layers += [nn.Linear(before, after), activation(draw)]
    return nn.Sequential(*layers, nn.Linear(widths[-1], draw.integer(2, 4))), (entries,)


def active_dense(draw: Draw) -> tuple[nn.Sequential, tuple[int, ...]]:
    model, shape = dense(draw)
    return nn.Sequential(*(child if isinstance(child, nn.Linear) else nn.ReLU() for child in model)), shape


def convolution(draw: Draw) -> tuple[nn.Sequential, tuple[int, ...]]:
    channels, size, out = draw.integer(1, 2), draw.integer(2, 4), draw.integer(1, 3)
    layers: list[nn.Module] = [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU()]
    if draw.rng.random() < 0.3:
        layers += [nn.Conv2d(out, out, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(out * size * size, draw.integer(2, 3))), (
        channels,
        size,
        size,
    )


def average_pool(draw: Draw) -> tuple[nn.Sequential, tuple[int, ...]]:
    out, pool = draw.integer(1, 3), draw.one_of((nn.AvgPool2d(2), nn.AvgPool2d(3, 1)))
    layers = [nn.Conv2d(1, out, 3, padding=1), activation(draw), pool, nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4 * out, draw.integer(2, 3))), (1, 4, 4)


def max_pool(draw: Draw) -> tuple[nn.Sequential, tuple[int, ...]]:
    out = draw.integer(1, 2)
    layers = [nn.Conv2d(1, out, 3, padding=1), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4 * out, draw.integer(2, 3))), (1, 4, 4)


def max_min(draw: Draw) -> tuple[nn.Sequential, tuple[int, ...]]:
    entries, width = draw.integer(1, 8), 2 * draw.integer(1, 3)
    layers = [nn.Linear(entries, width), MaxMin(), nn.Linear(width, width), MaxMin()]
    return nn.Sequential(*layers, nn.Linear(width, draw.integer(2, 3))), (entries,)


def batch_norm(draw: Draw) -> tuple[nn.Sequential, tuple[int, ...]]:
    if draw.rng.random() < 0.5:
        entries, width = draw.integer(1, 8), draw.integer(1, 6)
        layers = [nn.Linear(entries, width), nn.BatchNorm1d(width), activation(draw)]
        return nn.Sequential(*layers, nn.Linear(width, draw.integer(2, 3))), (entries,)
    out = draw.integer(1, 3)
    layers = [nn.Conv2d(1, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(9 * out, draw.integer(2, 3))), (1, 3, 3)


def normalize(draw: Draw) -> tuple[nn.Sequential, tuple[int, ...]]:
    model, shape = convolution(draw)
    mean, std = draw.rng.uniform(0, 1, shape[0]), [draw.power(-6, 2) for _ in range(shape[0])]
    return nn.Sequential(Normalize(mean.tolist(), std), *model), shape


def residual(draw: Draw) -> tuple[nn.Sequential, tuple[int, ...]]:
    entries, width = draw.integer(1, 8), draw.integer(1, 6)
    body = nn.Linear(width, width), activation(draw), nn.Linear(width, width)
    layers = [nn.Linear(entries, width), activation(draw), Residual(*body), activation(draw)]
    return nn.Sequential(*layers, nn.Linear(width, draw.integer(2, 3))), (entries,)


def smooth(draw: Draw) -> tuple[nn.Sequential, tuple[int, ...]]:
    model, shape = dense(draw)
    kinds = tuple(SMOOTH)
    return nn.Sequential(*(c if isinstance(c, nn.Linear) else draw.one_of(kinds)() for c in model)), shape


def product(draw: Draw) -> tuple[nn.Sequential, tuple[int, ...]]:
    entries, width = draw.integer(1, 6), draw.integer(2, 5)
    layers: list[nn.Module] = []
    for before in (entries, width)[: draw.integer(1, 2)]:
        inner = draw.one_of((Squared(), Turned(width, over=False), Turned(width, over=True)))
        layers += [nn.Linear(before, width), inner]
    return nn.Sequential(*layers, nn.Linear(width, draw.integer(2, 3))), (entries,)


def inner_softmax(draw: Draw) -> tuple[nn.Sequential, tuple[int, ...]]:
    entries, width = draw.integer(1, 8), draw.integer(2, 6)
    layers = [nn.Linear(entries, width), nn.Softmax(1), nn.Linear(width, width), activation(draw)]
    return nn.Sequential(*layers, nn.Linear(width, draw.integer(2, 3))), (entries,)


def layer_norm(draw: Draw) -> tuple[nn.Sequential, tuple[int, ...]]:
    entries, width = draw.integer(1, 8), draw.integer(2, 6)
    norm = nn.LayerNorm(width, eps=draw.power(-20, 0))
    layers = [nn.Linear(entries, width), norm, activation(draw)]
    return nn.Sequential(*layers, nn.Linear(width, draw.integer(2, 3))), (entries,)


def attention(draw: Draw) -> tuple[nn.Sequential, tuple[int, ...]]:
    entries, columns = draw.integer(1, 8), draw.integer(1, 3)
    width = columns * draw.integer(1, 3)
    layers = [nn.Linear(entries, width), Attention(columns), nn.Linear(width, 4), activation(draw)]
    return nn.Sequential(*layers, nn.Linear(4, draw.integer(2, 3))), (entries,)


CALM: dict[str, Callable[[Draw], tuple[nn.Sequential, tuple[int, ...]]]] = {
    "smooth": smooth,
    "product": product,
    "softmax": inner_softmax,
    "layer norm": layer_norm,
    "attention": attention,
}
"""Kinds whose weights are mostly of ordinary size: with others they are flat."""
KINDS: dict[str, Callable[[Draw], tuple[nn.Sequential, tuple[int, ...]]]] = {
    "linear": linear,
    "deep linear": deep_linear,
    "always active, dense": active_dense,
    "always active, convolutional": convolution,
    "dense": dense,
    "convolutional": convolution,
    "average pool": average_pool,
    "max pool": max_pool,
    "MaxMin": max_min,
    "BatchNorm": batch_norm,
    "Normalize": normalize,
    "residual": residual,
    **CALM,
}


def fill(draw: Draw, model: nn.Sequential, x: Tensor, biases: str) -> Tensor:
    """Draw the weights layer by layer, each with what reaches it from x in float64; the layers' result.

    Args:
        biases: ``absolute`` scales them by 2^±20, ``comparable`` by the spread of what they are added to, and
            ``active`` makes them large and positive, up to where the precision just sees the spread. ``calm`` is
            comparable, and scales weights by 2^±2 where the others do by 2^±20.
    """
    for module in model:
        if isinstance(module, nn.Linear | nn.Conv2d):
            assert module.bias is not None
            weight = draw.normal(*module.weight.shape) / math.sqrt(module.weight[0].numel())
            reach = 2 if biases == "calm" else 20
            module.weight.copy_(draw.rounded(weight * draw.power(-reach, reach)))
            module.bias.zero_()
            spread = _spread(module(x))
            scale = {
                "absolute": lambda: draw.power(-20, 20),
                "calm": lambda spread=spread: spread * draw.power(-3, 3),
                "comparable": lambda spread=spread: spread * draw.power(-3, 3),
                "active": lambda spread=spread: spread * draw.power(3, 0.8 * draw.digits),
            }[biases]()
            bias = draw.normal(*module.bias.shape) * scale
            module.bias.copy_(draw.rounded(bias.abs() + scale if biases == "active" else bias))
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            _fill_batch_norm(draw, module, x)
        x = x + fill(draw, module.body, x, biases) if isinstance(module, Residual) else module(x)
    return x


def _fill_batch_norm(draw: Draw, module: nn.BatchNorm1d | nn.BatchNorm2d, x: Tensor) -> None:
    """Running statistics near those of x; variances are squares of few digits, for the sake of the oracle."""
    assert module.running_mean is not None
    assert module.running_var is not None
    dims = [0, *range(2, x.dim())]
    module.eps = 0.0
    mantissa, exponent = torch.frexp(x.std(dims).clamp(min=2.0**-40))
    deviation = torch.ldexp((mantissa * 64).round() / 64, exponent)
    module.running_mean.copy_(draw.rounded(x.mean(dims) + deviation * draw.normal(len(deviation))))
    module.running_var.copy_(deviation.square())
    module.weight.copy_(draw.normal(len(deviation)))
    module.bias.copy_(draw.normal(len(deviation)))


def _spread(values: Tensor) -> float:
    """Of the entries over the examples."""
    return max(float((values - values.mean(0)).abs().mean()), 2.0**-60)


@torch.no_grad()
def network(draw: Draw, kind: str, examples: int, low: float, high: float) -> tuple[nn.Sequential, Tensor]:
    """A network of a kind and inputs of it, most of them not far from its class boundaries."""
    model, shape = KINDS[kind](draw)
    model.double().eval()
    width = high - low if math.isfinite(high) else draw.power(-10, 10)
    start = low if math.isfinite(low) else -width / 2
    x = torch.from_numpy(draw.rng.random((examples, *shape))) * width
    x[:2] = (x[:2] / width).round() * width  # corners, as black and white are
    if draw.rng.random() < 0.3:  # all close to one of them: edges below the numbers' spacing
        x = x[-1] + (x - x[-1]) * draw.power(-draw.digits, 0)
    x = (draw.rounded(start + x)).clamp(low, high)
    biases = "active" if kind.startswith("always") else draw.one_of(("absolute", "comparable", "active"))
    biases = "calm" if kind in CALM and draw.rng.random() < 0.8 else biases
    logits = fill(draw, model, x, biases)
    if draw.rng.random() < 0.9:
        last = model[-1]
        assert isinstance(last, nn.Linear)
        share = draw.power(*draw.one_of(((-4, 2), (-draw.digits, 0))))
        offset = _spread(logits) * share * draw.normal(logits.shape[1])
        near = logits[draw.integer(0, examples - 1)] + offset
        last.bias.copy_(draw.rounded(last.bias - near))
    return model.to(draw.dtype), x.to(draw.dtype)
