"""Softmax and log-softmax on the way: planes below and above each probability.

With S_i = Σ_j exp(x_j − x_i), p_i = 1 / S_i. Below, exp(x_j − x_i) is at most its chord, and 1 / S at least its
tangent at the S that the chords give at the centre (log p likewise). Above, log p_i is concave and at most its
tangent at the centre, and p_i = exp(log p_i) at most the chord from end to end (Wei et al., 2023). Nothing here
changes where all logits are shifted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.bounds.calls import Argument, Call, Rows
from holdfast.bounds.interval import Interval, rule
from holdfast.bounds.operators import Operator, Softmax, UnsupportedOperator
from holdfast.bounds.relaxation import Slopes, pull_cost, relax
from holdfast.bounds.rounding import KERNEL, Cost

FAR = 40.0
"""Where some logit may lie so much above its own, a probability has its least value for a lower bound."""


@dataclass(frozen=True)
class Maps:
    """W v + b below and above, over one dimension of K entries, in each of R rows."""

    lower: Tensor
    """(N, R, K, K)."""
    upper: Tensor
    lower_offset: Tensor
    """(N, R, K)."""
    upper_offset: Tensor
    dim: int
    """Of the K entries, in a value (N, ...)."""
    cost: Cost | None = None

    def pull(self, a: Tensor) -> tuple[Tensor, Tensor]:
        last = a.movedim(self.dim + 1 if self.dim > 0 else self.dim, -1)
        rows = last.flatten(2, -2) if last.dim() > 3 else last[:, :, None]
        rows = rows.transpose(1, 2)  # (N, R, S, K)
        below = rows.clamp(min=0)
        above = rows - below
        pulled = below @ self.lower + above @ self.upper
        offset = (below @ self.lower_offset[..., None] + above @ self.upper_offset[..., None])[..., 0].sum(1)
        pulled = pulled.transpose(1, 2).reshape(last.shape)
        return pulled.movedim(-1, self.dim + 1 if self.dim > 0 else self.dim), offset

    def take(self, rows: Tensor) -> Maps:
        maps = (self.lower[rows], self.upper[rows], self.lower_offset[rows], self.upper_offset[rows])
        return Maps(*maps, self.dim, self.cost and self.cost.take(rows))


@relax.register
def _(operator: Softmax, value: Interval, slopes: Slopes) -> Maps:
    low, high, centre, size = (_rows(t, operator.dim) for t in (value.lower, value.upper, value.centre, value.size))
    known = rule(Softmax(True, operator.dim), value)
    least, most = (_rows(t, operator.dim) for t in (known.lower, known.upper))
    below, offset, below_size = _below(low, high, size, least, operator.log, value)
    above, over, above_size = _above(centre, size, least, most, operator.log)
    cost = None
    if (rounding := value.rounding) is not None:
        both = torch.maximum(below_size, above_size)
        error = rounding.gamma(2 * low.shape[-1] + 4 * KERNEL) * both
        shape = value.centre.movedim(operator.dim, -1).shape
        both, error = (t.view(shape).movedim(-1, operator.dim) for t in (both, error))
        cost = pull_cost(value, both, error)
    return Maps(below, above, offset, over, operator.dim, cost)


def _rows(t: Tensor, dim: int) -> Tensor:
    """(N, R, K)."""
    last = t.movedim(dim, -1)
    return last.flatten(1, -2) if last.dim() > 2 else last[:, None]


def _below(
    low: Tensor, high: Tensor, size: Tensor, least: Tensor, log: bool, value: Interval
) -> tuple[Tensor, Tensor, Tensor]:
    """The planes below: W, b, and the sizes of what each is the sum of."""
    start, end = low[..., None, :] - high[..., :, None], high[..., None, :] - low[..., :, None]  # of x_j − x_i
    if (rounding := value.rounding) is not None:
        start, end = rounding.below(start), rounding.above(end)
    itself = torch.eye(low.shape[-1], dtype=torch.bool, device=low.device)
    far = (end.masked_fill(itself, 0).amax(-1) > FAR)[..., None]
    start, end = (t.masked_fill(itself | far, 0) for t in (start, end))
    width = end - start
    chord = start.exp() * torch.where(width > 0, torch.expm1(width) / torch.where(width > 0, width, 1), 1)
    chord = chord.masked_fill(itself, 0)
    total = ((start.exp() + end.exp()) / 2).sum(-1)  # at the centre
    constant = start.exp() - chord * start  # of the chords, 1 for i itself
    scale = 1 / total if log else total.reciprocal().square()
    first = 1 - total.log() if log else 2 / total
    weights = scale[..., None] * (torch.diag_embed(chord.sum(-1)) - chord)
    offset = first - scale * constant.sum(-1)
    terms = end.exp() + chord * (start.abs() + size[..., None, :] + size[..., :, None])
    sizes = first.abs() + total.log().abs() + scale * terms.sum(-1)
    away = far[..., 0]
    floor = least if log else least.exp()
    if rounding is not None and not log:
        floor = floor * (1 - rounding.gamma(KERNEL))
    return (
        weights.masked_fill(far, 0),
        torch.where(away, floor, offset),
        torch.where(away, floor.abs(), sizes),
    )


def _above(centre: Tensor, size: Tensor, least: Tensor, most: Tensor, log: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The planes above, likewise."""
    at, p = centre.log_softmax(-1), centre.softmax(-1)
    one = torch.eye(centre.shape[-1], dtype=centre.dtype, device=centre.device)
    tangent = one - p[..., None, :]  # log p_i ≤ at_i + ⟨tangent_i, x − centre⟩
    constant = at - (tangent @ centre[..., None])[..., 0]
    sizes = at.abs() + 2 * (tangent.abs() @ size[..., None])[..., 0] + size.amax(-1, keepdim=True) + 1
    if log:
        return tangent, constant, sizes
    width = most - least
    share = torch.where(width > 0, -torch.expm1(-width) / torch.where(width > 0, width, 1), 1)
    slope = most.exp() * share  # of the chord of exp
    offset = least.exp() + slope * (constant - least)
    return slope[..., None] * tangent, offset, least.exp() + slope * (sizes + least.abs() + 1)


def _softmax(call: Call, log: bool) -> Operator:
    def rule(input: Argument, dim: int | None = None, *rest: Any, dtype: Any = None, **other: Any) -> Operator:
        if dtype is not None or any(isinstance(each, torch.dtype) for each in rest):
            raise UnsupportedOperator("a softmax in another dtype has no rule")
        return Softmax(log, (0 if input.value.dim() == 3 else 1) if dim is None else dim)

    return rule(*call.args, **call.kwargs)


_aten = torch.ops.aten
SOFTMAX: Rows = [
    (partial(_softmax, log=False), [F.softmax, torch.softmax, Tensor.softmax, _aten.softmax.int]),
    (partial(_softmax, log=True), [F.log_softmax, torch.log_softmax, Tensor.log_softmax, _aten.log_softmax.int]),
]
