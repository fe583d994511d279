"""Tighter intervals of a value: backward passes from its neurons, those at one position together."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.bounds import budget
from holdfast.bounds.fields import Plan, pool_geometry
from holdfast.bounds.interval import Interval
from holdfast.bounds.operators import MaxPool
from holdfast.bounds.patches import Patches
from holdfast.bounds.region import Region
from holdfast.bounds.rounding import Bound

BoundAt = Callable[[Patches], Bound]
"""Lower bounds (P, 2 S) of the neurons and their negatives at P positions."""


def tightened(
    plan: Plan,
    region: Region,
    value: Interval,
    asked: Tensor,
    bound: BoundAt,
    intersect: bool,
    going: Callable[[], bool] = lambda: True,
) -> Interval:
    """The interval of the plan's value, where it is asked.

    Neurons of a map that are at one position of one example share what they see; those of any other value share
    the whole example.

    Args:
        asked: which neurons, (N, ...) bool.
        intersect: keep what is known beside what is found.
        going: asked before each chunk of neurons whether there is time for it; the others keep what is known.
    """
    mapped = plan.source in plan.windows
    asked = asked.flatten(2) if mapped else asked.flatten(1)[:, :, None]
    ends = [end.reshape(asked.shape) for end in (value.lower, value.upper)]
    found: list[tuple[Tensor, ...]] = []
    for owner, position, channel in groups(asked, max(1, budget.of_pass(value.centre) // (2 * plan.width))):
        if not going():
            break
        low, high = bound(Patches(plan, owner, position, channel)).lower.chunk(2, 1)
        wanted = asked[owner[:, None], channel, position[:, None]]
        place = (t.expand_as(channel)[wanted] for t in (owner[:, None], channel, position[:, None]))
        found.append((low[wanted], -high[wanted], *place))
    if found:
        low, high, *rest = (torch.cat(column) for column in zip(*found, strict=True))
        places = tuple(rest)
        if intersect:
            low, high = torch.maximum(low, ends[0][places]), torch.minimum(high, ends[1][places])
            low, high = torch.minimum(low, high), torch.maximum(low, high)  # should rounding cross them
        ends = [end.index_put(places, new) for end, new in zip(ends, (low, high), strict=True)]
    lower, upper = (end.view_as(value.centre) for end in ends)
    return Interval.between(lower, upper, region.rounding)


def groups(asked: Tensor, room: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Positions with about as many asked neurons each, for at most ``room`` of these together if one has no more:
    owner (P,), position (P,), and channels (P, S) among which are all that are asked.

    Args:
        asked: (N, C, positions) bool.
    """
    counts = asked.sum(1)
    order = counts.flatten().argsort(stable=True, descending=True)[: int((counts > 0).sum())]
    owners, positions = torch.div(order, counts.shape[1], rounding_mode="floor"), order % counts.shape[1]
    most = counts.flatten()[order].tolist()
    found, begin = [], 0
    while begin < len(most):
        functions = most[begin]
        end = begin + max(1, room // functions)
        owner, position = owners[begin:end], positions[begin:end]
        channels = asked[owner, :, position].int().argsort(stable=True, dim=1, descending=True)[:, :functions]
        found += [(owner, position, some) for some in channels.split(max(1, room), 1)]
        begin = end
    return found


def contested(operator: MaxPool, value: Interval) -> Tensor:
    """The entries that may be the largest of a window in which another may be, too; (N, ...) bool."""
    lower, upper, open_ends = value.lower, value.upper, value.radius > 0
    geometry = pool_geometry(operator, tuple(lower.shape[1:]), lower) if lower.dim() == 4 else None
    if geometry is None:
        return open_ends
    size, stride, padding = geometry
    best = operator.where(lower)[0]
    pads, reach = [], [(n - 1) * s + k for n, s, k in zip(best.shape[2:], stride, size, strict=True)]
    for i in (1, 0):
        pads += [padding[i], max(0, reach[i] - padding[i] - lower.shape[2 + i])]
    windows = F.pad(upper, pads, value=-torch.inf).unfold(2, size[0], stride[0]).unfold(3, size[1], stride[1])
    rivals = windows >= best[..., None, None]
    rivals &= rivals.sum((4, 5), keepdim=True) > 1
    columns = rivals.permute(0, 1, 4, 5, 2, 3).reshape(len(lower), -1, best[0, 0].numel()).to(lower)
    wide = [max(n, lower.shape[2 + i] + padding[i]) for i, n in enumerate(reach)]
    found = F.fold(columns, (wide[0], wide[1]), size, stride=stride) > 0
    rows, columns_ = (slice(padding[i], padding[i] + lower.shape[2 + i]) for i in range(2))
    return found[:, :, rows, columns_] & open_ends
