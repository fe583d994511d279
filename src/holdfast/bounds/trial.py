"""Whether a rule that a user registered tells the truth: tried when first used, on random and structured inputs.

A certificate is worth what its rules are. A trial compares what the kind of operator claims with what the function
answers, around the traced values and far from them, each entry by itself. It finds lies, and proves nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from holdfast.bounds.calls import Argument, Call
from holdfast.bounds.evidence import (
    BUDGET,
    Draw,
    deny,
    deny_where,
    few,
    kind,
    largest,
    noise,
    noise_each,
    one_hot,
    place,
    worst,
)
from holdfast.bounds.interval import Interval, rule
from holdfast.bounds.operators import (
    Affine,
    Elementwise,
    LipschitzMap,
    MaxPool,
    Monotone,
    Operator,
    PairwiseMax,
    Rectifier,
    Shape,
    UnsupportedOperator,
    apply,
)

SCALES = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
"""Sizes of the inputs that are tried."""

_modules: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_calls: set[tuple[Any, str]] = set()


def try_once(operator: Operator, function: Callable[[Tensor], Tensor], value: Tensor) -> None:
    """Try a rule, unless this module with these weights, or the same call, was tried on this shape before.

    Args:
        operator: what the rule made of the function.
        function: a module or ``Call``.
        value: an input that was traced, (N, ...).

    Raises:
        UnsupportedOperator: the rule lies.
    """
    key: Any = (type(operator), value.shape, value.dtype)
    if isinstance(function, nn.Module):
        tensors = [*function.parameters(), *function.buffers()]
        key += tuple((id(tensor), None if tensor.is_inference() else tensor._version) for tensor in tensors)
        if _modules.get(function) != key:
            refute(operator, function, value)
            _modules[function] = key
        return
    assert isinstance(function, Call)
    rest = _pytree.tree_map(lambda a: None if isinstance(a, Argument) else a, (function.args, function.kwargs))
    key = (function.function, repr((rest, key)))
    if "tensor(" in key[1] or key not in _calls:  # numbers are written out whole, tensors are not
        refute(operator, function, value)
        _calls.add(key)


@torch.no_grad()
def refute(operator: Operator, function: Callable[[Tensor], Tensor], value: Tensor) -> None:
    """Try a rule.

    Raises:
        UnsupportedOperator: with the input and the two answers that do not go together.
    """
    value, draw = value.detach(), Draw(value)
    _agrees(operator, function, value, draw)
    trial(operator, value, draw)


def _agrees(operator: Operator, function: Callable[[Tensor], Tensor], value: Tensor, draw: Draw) -> None:
    """The operator computes what the function does, of each example alone, and leaves its input as it is."""
    for scale in SCALES:
        x = draw.bases(value, scale, 8)
        kept, answers = x.clone(), apply(operator, x)
        if not torch.equal(x, kept):
            raise UnsupportedOperator(f"{kind(operator)} changes its input in place")
        slack = 1e-4 * largest(answers) + torch.finfo(answers.dtype).tiny
        for name, other in (("the function", function(kept)), ("one at a time it", _one_by_one(operator, x))):
            if answers.shape != other.shape:
                raise UnsupportedOperator(f"{kind(operator)} makes another shape than the function")
            wrong = ((answers - other).abs() > slack).flatten(1).any(1)
            if wrong.any():
                at = int(wrong.nonzero()[0])
                raise UnsupportedOperator(
                    f"{kind(operator)} answers {few(answers[at])} at {few(x[at])}, where {name} answers "
                    f"{few(other[at])}"
                )


def _one_by_one(operator: Operator, x: Tensor) -> Tensor:
    return torch.cat([apply(operator, each) for each in x.split(1)])


@singledispatch
def trial(operator: Operator, value: Tensor, draw: Draw) -> None:
    """What the kind claims, tried; a new kind registers here. By default: intervals hold what is computed."""
    for scale in SCALES:
        base = draw.bases(value, scale, 16)
        radius = scale * draw.power(-2, 1, len(base), *[1] * (base.dim() - 1)).expand_as(base)
        bounds = rule(operator, Interval(base, radius))
        for _ in range(8):
            x = base + radius * (2 * draw.integers(2, *base.shape) - 1).to(base)
            answers = apply(operator, x)
            deny(operator, "that its interval rule holds", bounds.lower - answers, noise(answers, x), x)
            deny(operator, "that its interval rule holds", answers - bounds.upper, noise(answers, x), x)


@trial.register
def _(operator: Monotone, value: Tensor, draw: Draw) -> None:
    """No entry of the result falls where one entry of the input rises, or all of them."""
    size = value[0].numel()
    entries = min(size, max(4, BUDGET // (8 * size)))
    count = min(512, max(8, BUDGET // (entries * size)))
    for scale in SCALES:
        base = draw.bases(value, scale, count)
        flat, before = base.flatten(1), operator.function(base)
        which = [draw.integers(size, len(base), entries) if entries < size else _all(base), _extremes(flat)]
        which += [draw.integers(size, len(base), 2 * size)] if size < 16 else []
        number = torch.cat([*which, *_falling(operator, base, draw)], 1)
        step = scale * draw.power(-3, 1, *number.shape)
        for rows in torch.arange(len(base)).split(max(1, BUDGET // (number.shape[1] * size))):
            owner = rows.repeat_interleave(number.shape[1])
            raised = flat[owner].scatter_add(1, number[rows].view(-1, 1), step[rows].view(-1, 1))
            _deny_fall(operator, base[owner], raised.view(-1, *base.shape[1:]), before[owner])
        everywhere = base + scale * draw.power(-3, 1, len(base), *[1] * (base.dim() - 1))
        _deny_fall(operator, base, everywhere, before)


def _deny_fall(operator: Monotone, x: Tensor, raised: Tensor, before: Tensor) -> None:
    after = operator.function(raised)
    excess = before - after - noise(before, x) - noise(after, raised)
    if (found := worst(excess)) is None:
        return
    example, entry = found
    moved = (raised[example] - x[example]).flatten().argmax()
    one = (raised[example] != x[example]).sum() == 1
    raising = f"entry {place(moved, x.shape[1:])}" if one else "every entry"
    raise UnsupportedOperator(
        f"{kind(operator)} has to increase in every input, and does not: where {raising} of the input rises from "
        f"{x[example].flatten()[moved]:.6g} to {raised[example].flatten()[moved]:.6g}, entry "
        f"{place(entry, after.shape[1:])} of the result falls from "
        f"{before[example].flatten()[entry]:.6g} to {after[example].flatten()[entry]:.6g}; "
        f"the input is {few(x[example])}"
    )


def _all(base: Tensor) -> Tensor:
    return torch.arange(base[0].numel(), device=base.device).expand(len(base), -1)


def _extremes(flat: Tensor) -> Tensor:
    """The entries that are largest, least, and nearest to 0."""
    return torch.stack([flat.argmax(1), flat.argmin(1), flat.abs().argmin(1)], 1)


def _falling(operator: Monotone, base: Tensor, draw: Draw) -> Iterator[Tensor]:
    """Entries whose slope at a random entry of the result is least, (N, 1) each; none where there are no slopes."""
    for _ in range(8):
        with torch.enable_grad():
            x = base.clone().requires_grad_(True)
            answers = operator.function(x).flatten(1)
            if not answers.requires_grad:
                return
            chosen = draw.integers(answers.shape[1], len(base), 1)
            yield torch.autograd.grad(answers.gather(1, chosen).sum(), x)[0].flatten(1).argmin(1, keepdim=True)


@trial.register
def _(operator: MaxPool, value: Tensor, draw: Draw) -> None:
    """Monotone; the value is that of the entry named; no entry is in more windows than told."""
    _of(Monotone)(operator, value, draw)
    x = draw.bases(value, 1.0, 32)
    answers, (pooled, index) = operator.function(x), operator.where(x)
    named = x.flatten(2).gather(2, index.flatten(2)).view_as(answers)
    for other in (pooled, named):
        deny(operator, "where its largest entries are", (answers - other).abs(), noise(answers, x), x)
    if operator.overlap:
        hot = one_hot(value, draw) * 2 - 1
        windows = (operator.function(hot) == 1).flatten(1).sum(1, keepdim=True)
        deny(operator, f"that {operator.overlap} windows share an entry", windows - operator.overlap, 0, hot)


@trial.register
def _(operator: PairwiseMax, value: Tensor, draw: Draw) -> None:
    """Monotone; pairs of neighbouring channels are sorted."""
    _of(Monotone)(operator, value, draw)
    x = draw.bases(value, 1.0, 32)
    pairs = x[:, : x.shape[1] // 2 * 2].unflatten(1, (-1, 2)).sort(2, descending=True).values.flatten(1, 2)
    gap = (operator.function(x)[:, : pairs.shape[1]] - pairs).abs()
    deny(operator, "that it sorts neighbouring channels", gap, noise(pairs, x), x)


@trial.register
def _(operator: Elementwise, value: Tensor, draw: Draw) -> None:
    """Each entry by itself, and as steep, curved and monotone between turns as told; per entry of the input."""
    for scale in SCALES:
        x = draw.bases(value, scale, 10)
        answers, kept = operator.function(x), draw.uniform(0, 1, *x.shape) < 0.5
        if answers.shape != x.shape:
            raise UnsupportedOperator(f"{kind(operator)} changes the shape, {few(x[0])} to {few(answers[0])}")
        other = operator.function(torch.where(kept, x, x.roll(1, 0)))
        gap = (answers - other).abs().masked_fill(~kept, 0)
        deny(operator, "that each entry of the result depends on one entry alone", gap, noise(answers, x), x)
    middle, reach = _windows(operator, value, draw)
    points = torch.stack([middle - reach, middle, middle + reach])  # (3, W, ...)
    answers = operator.function(points.flatten(0, 1)).view_as(points)
    _deny_curvature(operator, points, answers)
    _deny_slopes(operator, points, answers)
    points, order = points.flatten(0, 1).sort(0)
    _deny_turns(operator, points, answers.flatten(0, 1).gather(0, order))


@trial.register
def _(operator: Rectifier, value: Tensor, draw: Draw) -> None:
    """max(v, leak · v), and what every elementwise function is."""
    for scale in SCALES:
        x = draw.bases(value, scale, 16)
        gap = (operator.function(x) - torch.maximum(x, operator.leak * x)).abs()
        deny(operator, f"that it is max(v, {operator.leak} v)", gap, noise(x, x), x)
    _of(Elementwise)(operator, value, draw)


def _windows(operator: Elementwise, value: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """Middles and half-widths of small intervals anywhere and around traced values, kinks and turns, (W, ...)."""
    size = value[0].numel()
    count = min(1024, max(8, BUDGET // (3 * size)))
    middle = draw.power(-3, 3, count, size) * draw.normal(count, size)
    middle[::4] = value.flatten(1)[draw.integers(len(value), len(middle[::4]))]
    reach = draw.power(-2.5, 0, count, size) * (0.1 + middle.abs())
    special = (*operator.kinks, *operator.turns)
    for number, point in enumerate(special):
        rows = slice(1 + 4 * number, None, 4 * len(special))
        middle[rows] = point + reach[rows] * draw.normal(*middle[rows].shape)
    return middle.view(-1, *value.shape[1:]), reach.view(-1, *value.shape[1:])


def _deny_curvature(operator: Elementwise, points: Tensor, answers: Tensor) -> None:
    left, right = points[1] - points[0], points[2] - points[1]
    bend = ((answers[2] - answers[1]) / right - (answers[1] - answers[0]) / left) * 2 / (left + right)
    smooth = torch.ones_like(bend, dtype=torch.bool)
    for kink in operator.kinks:
        smooth &= (points[2] < kink) | (kink < points[0])
    slack = 4 * noise_each(answers, points).amax(0) / torch.minimum(left, right).square()
    excess = bend.abs() - 1.001 * operator.curvature - slack
    claim = f"a curvature of at most {operator.curvature} away from its kinks {operator.kinks}"
    deny_where(operator, claim, excess.masked_fill(~smooth, 0), points, answers)


def _deny_slopes(operator: Elementwise, points: Tensor, answers: Tensor) -> None:
    slack = noise_each(answers, points)
    excess = answers.diff(dim=0).abs() - 1.0001 * operator.steepest * points.diff(dim=0) - slack[1:] - slack[:-1]
    ends, values = torch.stack([points[:-1], points[1:]]), torch.stack([answers[:-1], answers[1:]])
    deny_where(operator, f"a slope of at most {operator.steepest}", excess, ends, values)


def _deny_turns(operator: Elementwise, points: Tensor, answers: Tensor) -> None:
    """Between turns an entry (P, ...) over ascending points may rise or fall, but not both."""
    turns = sorted(operator.turns)
    for low, high in zip((-torch.inf, *turns), (*turns, torch.inf), strict=True):
        outside = (points < low) | (points > high) | answers.isnan()
        falls, rises = (_departures(sign * answers, points, outside) for sign in (1, -1))
        mixed = torch.minimum(falls[0].amax(0), rises[0].amax(0)) > 0
        for excess, since in (falls, rises):
            ends, values = (torch.stack([t.gather(0, since), t]) for t in (points, answers))
            claim = f"to rise or to fall all the way from {low} to {high}"
            deny_where(operator, claim, excess.masked_fill(~mixed, 0), ends, values)


def _departures(answers: Tensor, points: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """How far each answer is below the largest before it, beyond rounding, and the number of that one."""
    highest, since = answers.masked_fill(outside, -torch.inf).cummax(0)
    slack = noise_each(answers, points)
    excess = highest - answers - slack - slack.gather(0, since)
    return excess.masked_fill(outside, 0).nan_to_num(nan=0.0, posinf=0.0), since


@trial.register
def _(operator: Affine, value: Tensor, draw: Draw) -> None:
    """x ↦ W x + b, with |W| as told, and the adjoint, the norm and ``entrywise``."""
    bias = operator.forward(torch.zeros_like(value[:1]))

    def linear(x: Tensor) -> Tensor:
        return operator.forward(x) - bias

    for scale in SCALES:
        x = draw.bases(value, scale, 16)
        y = x[torch.arange(len(x)).roll(1)] * draw.uniform(-2, 2, len(x), *[1] * (x.dim() - 1))
        first, second, both = linear(x), linear(y), linear(x + y)
        slack = noise(first, first) + noise(second, second) + noise(both, both) + 4 * noise(bias, bias)
        deny(operator, "to be affine", (first + second - both).abs(), slack, x)
        apart, together = (
            operator.absolute(x.abs()) + operator.absolute(y.abs()),
            operator.absolute(x.abs() + y.abs()),
        )
        deny(operator, "that |W| is linear", (apart - together).abs(), 2 * noise(together, together), x)
    signs = _rows_and_columns(operator, value, draw, bias.shape[1:])
    above = operator.absolute(signs.abs())
    slack = noise(above, above) + 4 * noise(bias, bias)
    deny(operator, "that |W| r is at least any |W x| with |x| = r", linear(signs).abs() - above, slack, signs)
    _deny_adjoint(operator, linear, value, draw, bias)
    if operator.entrywise:
        _deny_mixing(operator, linear, value, draw)
    if operator.norm:
        gain = _steepest(linear, torch.zeros_like(value[:1]), draw, 1.0)
        deny(operator, f"a norm of at most {operator.norm()}", gain - operator.norm() * (1 + 1e-4), 0, value[:1])


def _rows_and_columns(operator: Affine, value: Tensor, draw: Draw, result: Shape) -> Tensor:
    """Inputs that single out a column of W, and the signs of some of its rows, where |W x| is largest."""
    outputs = draw.like.new_zeros(32, *result)
    outputs.view(32, -1)[torch.arange(32), draw.integers(outputs[0].numel(), 32)] = 1
    rows = operator.adjoint(outputs, tuple(value.shape[1:])).sign()
    return torch.cat([one_hot(value, draw), rows, torch.ones_like(value[:1])])


def _deny_adjoint(
    operator: Affine, linear: Callable[[Tensor], Tensor], value: Tensor, draw: Draw, bias: Tensor
) -> None:
    x = draw.normal(16, *value.shape[1:])
    a = draw.normal(16, *bias.shape[1:])
    there, back = a * linear(x), operator.adjoint(a, tuple(value.shape[1:])) * x
    there, back = (t.flatten(1).sum(1, keepdim=True) for t in (there, back))
    size = a.flatten(1).norm(dim=1) * (linear(x).flatten(1).norm(dim=1) + bias.norm())
    deny(operator, "that its adjoint belongs to it", (there - back).abs(), 1e-4 * size[:, None], x)


def _deny_mixing(operator: Affine, linear: Callable[[Tensor], Tensor], value: Tensor, draw: Draw) -> None:
    for _ in range(8):
        x = draw.uniform(1, 2, 4, *value.shape[1:])
        kept = draw.uniform(0, 1, *x.shape) < 0.5
        parts = x * kept, x * ~kept
        for read in (linear, operator.absolute):
            both = torch.minimum(*(read(part).abs() for part in parts))
            deny(operator, "that an entry of the result reads one of the input", both, noise(both, x), x)


@trial.register
def _(operator: LipschitzMap, value: Tensor, draw: Draw) -> None:
    """No two inputs are taken farther apart than the constant says."""
    for scale in SCALES:
        base = draw.bases(value, scale, 16)
        for share in (1e-2, 1.0):
            reach = share * scale
            quotient = _steepest(operator.function, base, draw, reach)
            slack = noise(operator.function(base), base).flatten(1) * value[0].numel() ** 0.5 / reach
            excess = quotient - operator.constant * (1 + 1e-4)
            deny(operator, f"a Lipschitz constant of {operator.constant}", excess, slack, base)


def _steepest(function: Callable[[Tensor], Tensor], base: Tensor, draw: Draw, reach: float) -> Tensor:
    """The largest ‖f(x + d) − f(x)‖ / ‖d‖ with ‖d‖ = reach that power iteration finds at each x, (N, 1)."""

    def unit(t: Tensor) -> Tensor:
        return reach * t / t.flatten(1).norm(dim=1).clamp(min=1e-30).view(-1, *[1] * (t.dim() - 1))

    direction, found = unit(draw.normal(*base.shape)), base.new_zeros(len(base), 1)
    before = function(base)
    for _ in range(12):
        with torch.enable_grad():
            x = (base + direction).requires_grad_(True)
            after = function(x)
        moved = (after - before).detach()
        actual = (x.detach() - base).flatten(1).norm(dim=1, keepdim=True)
        found = torch.maximum(found, moved.flatten(1).norm(dim=1, keepdim=True) / actual.clamp(min=1e-30))
        if after.requires_grad:
            direction = unit(torch.autograd.grad(after, x, unit(moved))[0])
        else:
            direction = unit(draw.normal(*base.shape))
    return found


def _of(kind: type[Operator]) -> Callable[..., None]:
    return trial.dispatch(kind)
