"""Small networks in rational arithmetic: what their float weights say, without a rounding anywhere.

Every float is an integer over a power of two, so layers that are affine in pieces (dense, convolution, pooling,
ReLU, MaxMin, BatchNorm with a rational standard deviation, sums) have exact values and exact gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.layers import Abs, MaxMin, Normalize


@dataclass(frozen=True)
class Exact:
    """Rational numbers: an array of Python's integers over one positive integer."""

    top: np.ndarray
    bottom: int = 1

    def over(self, bottom: int) -> np.ndarray:
        """The numerators over another denominator, a multiple of this one."""
        return self.top * (bottom // self.bottom)

    def __neg__(self) -> Exact:
        return Exact(-self.top, self.bottom)

    def __add__(self, other: Exact) -> Exact:
        bottom = math.lcm(self.bottom, other.bottom)
        return Exact(self.over(bottom) + other.over(bottom), bottom)

    def __sub__(self, other: Exact) -> Exact:
        return self + -other

    def __mul__(self, other: Exact) -> Exact:
        return Exact(self.top * other.top, self.bottom * other.bottom)

    def __matmul__(self, other: Exact) -> Exact:
        return Exact(self.top @ other.top, self.bottom * other.bottom)

    def __getitem__(self, index: Any) -> Exact:
        return Exact(self.top[index], self.bottom)

    def map(self, function: Callable[[Fraction], Fraction]) -> Exact:
        """A function of each number."""
        fractions = [function(Fraction(number, self.bottom)) for number in self.top.ravel().tolist()]
        bottom = reduce(math.lcm, (fraction.denominator for fraction in fractions), 1)
        tops = [fraction.numerator * (bottom // fraction.denominator) for fraction in fractions]
        return Exact(objects(tops).reshape(self.top.shape), bottom)

    def floats(self) -> list[float]:
        """The nearest doubles."""
        return [float(Fraction(number, self.bottom)) for number in self.top.ravel().tolist()]


def objects(numbers: Iterable[int]) -> np.ndarray:
    return np.array([*numbers, None], dtype=object)[:-1]


def exactly(values: Tensor | np.ndarray | float) -> Exact:
    """The numbers that these floats are.

    Raises:
        ValueError: one of them is NaN or infinite.
    """
    array = np.asarray(values.detach().double() if isinstance(values, Tensor) else values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError("NaN and inf are no numbers")
    mantissa, exponent = np.frexp(array.ravel())
    places = np.maximum(0, 53 - exponent)
    most = int(places.max(initial=0))
    whole = np.ldexp(mantissa, 53).astype(np.int64).tolist()
    # mantissa · 2^(exponent − 53) over 2^most
    tops = [
        number << (most + power - 53) if number else 0
        for number, power in zip(whole, exponent.tolist(), strict=True)
    ]
    return Exact(objects(tops).reshape(array.shape), 1 << most)


Pull = Callable[[Exact], Exact]
"""From the gradient by a layer's result to that by its input."""
Layer = Callable[[Exact], tuple[Exact, Pull]]
"""A layer on one flat input: its result, and what pulls gradients back there."""


class Residual(nn.Module):
    """x + body(x)."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def affine(matrix: Exact, constant: Exact) -> Layer:
    return lambda v: (matrix @ v + constant, lambda g: g @ matrix)


def scaling(factor: Exact, shift: Exact) -> Layer:
    """The same entry by entry."""
    return lambda v: (v * factor + shift, lambda g: g * factor)


def in_pieces(function: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]], bottom: int = 1) -> Layer:
    """An entrywise function: from numerators and denominator, its values and slopes times ``bottom``."""

    def layer(v: Exact) -> tuple[Exact, Pull]:
        values, slopes = function(v.top, v.bottom)
        return Exact(values, v.bottom * bottom), lambda g: Exact(g.top * slopes, g.bottom * bottom)

    return layer


def selection(choose: Callable[[np.ndarray], np.ndarray]) -> Layer:
    """Every result is one of the inputs, whose numbers ``choose`` tells."""

    def layer(v: Exact) -> tuple[Exact, Pull]:
        chosen = choose(v.top)

        def pull(g: Exact) -> Exact:
            result = objects([0] * len(v.top))
            np.add.at(result, chosen, g.top)
            return Exact(result, g.bottom)

        return v[chosen], pull

    return layer


def in_turn(layers: list[Layer]) -> Layer:
    def layer(v: Exact) -> tuple[Exact, Pull]:
        pulls = []
        for each in layers:
            v, pull = each(v)
            pulls.append(pull)
        return v, lambda g: reduce(lambda gradient, back: back(gradient), reversed(pulls), g)

    return layer


def residual(body: Layer) -> Layer:
    def layer(v: Exact) -> tuple[Exact, Pull]:
        inner, pull = body(v)
        return v + inner, lambda g: g + pull(g)

    return layer


def _leaky(slope: float) -> Layer:
    part = exactly(slope)
    leak, one = int(part.top), part.bottom
    return in_pieces(lambda top, _: (np.where(top > 0, top * one, top * leak), np.where(top > 0, one, leak)), one)


def _clamp(low: float, high: float) -> Layer:
    ends = exactly(np.array([low, high]))

    def function(top: np.ndarray, bottom: int) -> tuple[np.ndarray, np.ndarray]:
        below, above = ends.top * bottom
        scaled = top * ends.bottom
        inside = (scaled > below) & (scaled < above)
        return np.clip(scaled, below, above), inside.astype(object) * ends.bottom

    return in_pieces(function, ends.bottom)


def _absolute(top: np.ndarray, _: int) -> tuple[np.ndarray, np.ndarray]:
    sign = np.where(top < 0, -1, 1).astype(object)
    return top * sign, sign


def _linear(module: nn.Linear, shape: tuple[int, ...]) -> Layer:
    return affine(exactly(module.weight), exactly(module.bias))


def _matrix_of(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Exact:
    """The matrix of a linear map, (out, in), by what it makes of each unit vector: there nothing is added up."""
    one = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    return exactly(function(one).flatten(1).T)


def _convolution(module: nn.Conv2d, shape: tuple[int, ...]) -> Layer:
    rest: Any = (module.stride, module.padding, module.dilation, module.groups)
    weight = module.weight.detach().double()
    matrix = _matrix_of(lambda x: F.conv2d(x, weight, None, *rest), shape)
    assert module.bias is not None
    return affine(matrix, exactly(module.bias.repeat_interleave(len(matrix.top) // len(module.bias))))


def _average(module: nn.AvgPool2d, shape: tuple[int, ...]) -> Layer:
    assert isinstance(module.kernel_size, int)
    entries = module.kernel_size**2
    sums = _matrix_of(lambda x: (module(x) * entries).round(), shape)
    return affine(Exact(sums.top, sums.bottom * entries), exactly(np.zeros(len(sums.top))))


def _batch_norm(module: nn.BatchNorm1d | nn.BatchNorm2d, shape: tuple[int, ...]) -> Layer:
    assert module.running_mean is not None
    assert module.running_var is not None
    variance = exactly(module.running_var) + exactly(module.eps)
    factor = exactly(module.weight) * variance.map(lambda value: 1 / root(value))
    return _by_channel(factor, exactly(module.bias) - exactly(module.running_mean) * factor, shape)


def _normalize(module: Normalize, shape: tuple[int, ...]) -> Layer:
    factor = exactly(module.std).map(lambda value: 1 / value)
    return _by_channel(factor, -exactly(module.mean) * factor, shape)


def _by_channel(factor: Exact, shift: Exact, shape: tuple[int, ...]) -> Layer:
    channel = np.arange(shape[0]).repeat(math.prod(shape[1:]))
    return scaling(factor[channel], shift[channel])


def root(value: Fraction) -> Fraction:
    """The square root of a rational square.

    Raises:
        ValueError: it has no rational one.
    """
    result = Fraction(math.isqrt(value.numerator), math.isqrt(value.denominator))
    if result * result != value:
        raise ValueError(f"{float(value)} has no rational root; choose variances that have")
    return result


def _max_pool(module: nn.MaxPool2d, shape: tuple[int, ...]) -> Layer:
    windows = F.unfold(  # of numbers from 1, so that what is padded is 0
        torch.arange(1, math.prod(shape[1:]) + 1, dtype=torch.float64).view(1, 1, *shape[1:]),
        module.kernel_size,
        stride=module.stride,
    )[0].T.long()
    inputs = (
        (windows[None] - 1 + torch.arange(shape[0])[:, None, None] * math.prod(shape[1:])).flatten(0, 1).numpy()
    )
    return selection(lambda top: inputs[np.arange(len(inputs)), top[inputs].argmax(1)])


def _max_min(module: MaxMin, shape: tuple[int, ...]) -> Layer:
    numbers = np.arange(math.prod(shape)).reshape(shape[0], -1)
    first, second = numbers[0 : shape[0] // 2 * 2 : 2], numbers[1::2]

    def choose(top: np.ndarray) -> np.ndarray:
        result, ordered = numbers.copy(), top[first] >= top[second]
        result[0 : shape[0] // 2 * 2 : 2] = np.where(ordered, first, second)
        result[1::2] = np.where(ordered, second, first)
        return result.ravel()

    return selection(choose)


LAYERS: dict[type[nn.Module], Callable[[Any, tuple[int, ...]], Layer]] = {
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
    nn.AvgPool2d: _average,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    Normalize: _normalize,
    nn.Flatten: lambda module, shape: in_turn([]),
    nn.ReLU: lambda module, shape: _leaky(0.0),
    nn.LeakyReLU: lambda module, shape: _leaky(module.negative_slope),
    nn.Hardtanh: lambda module, shape: _clamp(module.min_val, module.max_val),
    Abs: lambda module, shape: in_pieces(_absolute),
    nn.MaxPool2d: _max_pool,
    MaxMin: _max_min,
    Residual: lambda module, shape: residual(_layer(module.body, shape)),
    nn.Sequential: lambda module, shape: in_turn(list(_children(module, shape))),
}
"""How each module is computed, given the shape of one input."""


def _layer(module: nn.Module, shape: tuple[int, ...]) -> Layer:
    return LAYERS[type(module)](module, shape)


def _children(module: nn.Sequential, shape: tuple[int, ...]) -> Iterable[Layer]:
    for child in module:
        yield _layer(child, shape)
        sample = torch.zeros(1, *shape, dtype=next(module.parameters()).dtype)
        shape = tuple(child(sample).shape[1:])


class ExactNetwork:
    """A network in eval mode, from one flat input to its logits.

    Args:
        model: of the modules in ``LAYERS``, one after the other.
        shape: of one input.

    Raises:
        KeyError: a module that is not among them.
    """

    def __init__(self, model: nn.Sequential, shape: tuple[int, ...]) -> None:
        with torch.no_grad():
            self.layer = _layer(model, shape)

    def margins(self, x: Exact, y: int) -> tuple[Exact, Callable[[int], np.ndarray]]:
        """z_y − z_j of every class j but y, ascending; and the direction of the gradient of each by its place."""
        logits, pull = self.layer(x)
        others = np.array([j for j in range(len(logits.top)) if j != y])

        def gradient(place: int) -> np.ndarray:
            row = objects([0] * len(logits.top))
            row[y], row[others[place]] = 1, -1
            return pull(Exact(row)).top

        return Exact(logits.top[y] - logits.top[others], logits.bottom), gradient
