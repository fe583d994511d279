"""Layers without rational values for the oracle of ``exact.py``, to 400 binary places; products, which have them.

An answer is then wrong by some 2^−300: a certificate is called false only where it fails by more than that.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
from exact import LAYERS, Exact, Layer, Pull, exactly, objects
from torch import Tensor, nn

PLACES = 400
"""Binary, behind the point."""
mp = mpmath.mp.clone()
mp.prec = 600


def number(value: Fraction) -> Any:
    return mp.mpf(value.numerator) / value.denominator


def fixed(values: list[Any]) -> Exact:
    """The nearest multiples of 2^−PLACES."""
    return Exact(objects([int(mp.nint(mp.ldexp(value, PLACES))) for value in values]), 1 << PLACES)


def numbers(v: Exact) -> list[Any]:
    return [number(Fraction(top, v.bottom)) for top in v.top.ravel().tolist()]


def smooth(function: Callable[[Any], Any], slope: Callable[[Any], Any]) -> Layer:
    """A function of each entry, and its derivative."""

    def layer(v: Exact) -> tuple[Exact, Pull]:
        values, slopes = ([each(x) for x in numbers(v)] for each in (function, slope))
        steep = fixed(slopes)
        return fixed(values), lambda g: g * steep

    return layer


Group = list[Any]


def mixing(function: Callable[[Group], Group], jacobian: Callable[[Group], list[Group]], n: int) -> Layer:
    """A function of every n entries together, (out, in) its Jacobian."""

    def layer(v: Exact) -> tuple[Exact, Pull]:
        entries = numbers(v)
        groups = [entries[i : i + n] for i in range(0, len(entries), n)]
        blocks = [fixed([x for row in jacobian(group) for x in row]) for group in groups]

        def pull(g: Exact) -> Exact:
            parts = [g.top[i * n : (i + 1) * n] @ block.top.reshape(n, n) for i, block in enumerate(blocks)]
            return Exact(np.concatenate(parts), g.bottom << PLACES)

        return fixed([x for group in groups for x in function(group)]), pull

    return layer


def sigmoid(x: Any) -> Any:
    return 1 / (1 + mp.exp(-x)) if x > 0 else mp.exp(x) / (1 + mp.exp(x))


def softmax(group: list[Any]) -> list[Any]:
    most = max(group)
    parts = [mp.exp(x - most) for x in group]
    return [part / sum(parts) for part in parts]


def softmax_slopes(group: list[Any]) -> list[list[Any]]:
    p = softmax(group)
    return [[(p[i] if i == j else 0) - p[i] * p[j] for j in range(len(p))] for i in range(len(p))]


def layer_norm(module: nn.LayerNorm) -> Layer:
    assert module.weight is not None
    weight, bias = (numbers(exactly(t)) for t in (module.weight, module.bias))
    n, eps = len(weight), number(Fraction(module.eps))

    def parts(group: list[Any]) -> tuple[list[Any], Any]:
        centred = [x - sum(group) / n for x in group]
        return centred, 1 / mp.sqrt(sum(c * c for c in centred) / n + eps)

    def function(group: list[Any]) -> list[Any]:
        centred, scale = parts(group)
        return [w * c * scale + b for w, c, b in zip(weight, centred, bias, strict=True)]

    def jacobian(group: list[Any]) -> list[list[Any]]:
        centred, scale = parts(group)
        return [
            [w * (scale * ((i == j) - mp.mpf(1) / n) - c * d * scale**3 / n) for j, d in enumerate(centred)]
            for i, (w, c) in enumerate(zip(weight, centred, strict=True))
        ]

    return mixing(function, jacobian, n)


class Squared(nn.Module):
    """x²."""

    def forward(self, x: Tensor) -> Tensor:
        return x.square()


class Turned(nn.Module):
    """x times (or over 1 + the square of) its entries in another order."""

    def __init__(self, width: int, over: bool) -> None:
        super().__init__()
        self.width, self.over = width, over
        self.order = [*range(1, width), 0]

    def forward(self, x: Tensor) -> Tensor:
        other = x[:, self.order]
        return x / (other.square() + 1) if self.over else x * other


class Attention(nn.Module):
    """softmax(x xᵀ) x, the entries read as a matrix of so many columns."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(len(x), -1, self.columns)
        return ((rows @ rows.transpose(1, 2)).softmax(-1) @ rows).flatten(1)


def _squared(v: Exact) -> tuple[Exact, Pull]:
    return v * v, lambda g: g * v * Exact(objects([2] * len(v.top)))


def _turned(module: Turned) -> Layer:
    order, back = np.array(module.order), np.argsort(np.array(module.order))

    def layer(v: Exact) -> tuple[Exact, Pull]:
        other = v[order]
        if not module.over:
            return v * other, lambda g: g * other + (g * v)[back]
        one = Exact(objects([1] * len(v.top)))
        inverse = (other * other + one).map(lambda value: 1 / value)
        steep = v * other * inverse * inverse * Exact(objects([-2] * len(v.top)))
        return v * inverse, lambda g: g * inverse + (g * steep)[back]

    return layer


def _attention(module: Attention) -> Layer:
    def layer(v: Exact) -> tuple[Exact, Pull]:
        x = mp.matrix([numbers(v)[i : i + module.columns] for i in range(0, len(v.top), module.columns)])
        scores = x * x.T
        p = [softmax([scores[i, j] for j in range(x.rows)]) for i in range(x.rows)]
        weights = mp.matrix(p)
        result = weights * x

        def pull(g: Exact) -> Exact:
            of = numbers(g)
            down = mp.matrix([of[i : i + module.columns] for i in range(0, len(of), module.columns)])
            by = down * x.T
            of_scores = mp.matrix(x.rows, x.rows)
            for i in range(x.rows):
                mean = sum(by[i, k] * p[i][k] for k in range(x.rows))
                for j in range(x.rows):
                    of_scores[i, j] = p[i][j] * (by[i, j] - mean)
            total = weights.T * down + of_scores * x + of_scores.T * x
            return fixed([total[i, j] for i in range(x.rows) for j in range(x.cols)])

        return fixed([result[i, j] for i in range(x.rows) for j in range(x.cols)]), pull

    return layer


def _gelu(x: Any) -> Any:
    return x * mp.ncdf(x)


SMOOTH: dict[type[nn.Module], tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    nn.Sigmoid: (sigmoid, lambda x: sigmoid(x) * sigmoid(-x)),
    nn.Tanh: (lambda x: 2 * sigmoid(2 * x) - 1, lambda x: 4 * sigmoid(2 * x) * sigmoid(-2 * x)),
    nn.SiLU: (lambda x: x * sigmoid(x), lambda x: sigmoid(x) + x * sigmoid(x) * sigmoid(-x)),
    nn.GELU: (_gelu, lambda x: mp.ncdf(x) + x * mp.npdf(x)),
    nn.Softplus: (lambda x: max(x, mp.zero) + mp.log1p(mp.exp(-abs(x))), sigmoid),
    nn.Mish: (
        lambda x: x * mp.tanh(mp.log1p(mp.exp(x))),
        lambda x: mp.tanh(mp.log1p(mp.exp(x))) + x * sigmoid(x) * mp.sech(mp.log1p(mp.exp(x))) ** 2,
    ),
    nn.ELU: (lambda x: x if x > 0 else mp.expm1(x), lambda x: mp.mpf(1) if x > 0 else mp.exp(x)),
    nn.Hardswish: (
        lambda x: x * min(max(x + 3, mp.zero), mp.mpf(6)) / 6,
        lambda x: mp.zero if x < -3 else (mp.mpf(1) if x > 3 else x / 3 + mp.mpf(1) / 2),
    ),
}
"""Each with its derivative."""
LAYERS.update({kind: (lambda module, shape, pair=pair: smooth(*pair)) for kind, pair in SMOOTH.items()})
LAYERS.update(
    {
        nn.Softmax: lambda module, shape: mixing(softmax, softmax_slopes, shape[-1]),
        nn.LayerNorm: lambda module, shape: layer_norm(module),
        Squared: lambda module, shape: _squared,
        Turned: lambda module, shape: _turned(module),
        Attention: lambda module, shape: _attention(module),
    }
)
