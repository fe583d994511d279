"""Tighter intervals of a value: backward passes from its neurons, those at one position together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from holdfast.bounds.interval import Interval
from holdfast.bounds.patches import Patches, Plan
from holdfast.bounds.region import Region
from holdfast.bounds.rounding import Bound

BUDGET = 2**25
"""Coefficients held at a time."""

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
    size, mapped = len(asked), plan.source in plan.windows
    asked = asked.flatten(2) if mapped else asked.flatten(1)[:, :, None]
    ends = [end.reshape(asked.shape) for end in (value.lower, value.upper)]
    if size and asked.any():
        for owner, position, channel in groups(asked, max(1, BUDGET // (2 * plan.width))):
            if not going():
                break
            low, high = bound(Patches(plan, owner, position, channel)).lower.chunk(2, 1)
            wanted = asked[owner[:, None], channel, position[:, None]]
            place = tuple(t.expand_as(channel)[wanted] for t in (owner[:, None], channel, position[:, None]))
            low, high = low[wanted], -high[wanted]
            if intersect:
                low, high = torch.maximum(low, ends[0][place]), torch.minimum(high, ends[1][place])
                low, high = torch.minimum(low, high), torch.maximum(low, high)  # should rounding cross them
            ends = [end.index_put(place, new) for end, new in zip(ends, (low, high), strict=True)]
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
