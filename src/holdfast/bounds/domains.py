"""Parts of a region as branch and bound keeps them: many that are bounded together, and each alone as it waits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holdfast.bounds.interval import Interval
from holdfast.bounds.optimised import Optimised


@dataclass(frozen=True)
class Domains:
    """M parts of the region, on each of which a clause of the specification is yet to be shown."""

    clause: Tensor
    """Its number, (M,)."""
    lower: Tensor
    """What is known: some row of the clause is at least this everywhere on the part, (M,)."""
    weights: Tensor
    """Of the clause's rows, ≥ 0 with sum 1: their mean bounds the largest, (M, R)."""
    signs: dict[int, Tensor]
    """By the number of the value: 1 where the part has v ≥ 0, −1 where v ≤ 0, else 0; (M, ...)."""
    slopes: dict[int, Tensor]
    """By the number of the ReLU, of the line below it; (M, ...)."""
    multipliers: dict[int, Tensor]
    """By the number of the value, β ≥ 0; (M, ...)."""

    def __len__(self) -> int:
        return len(self.clause)

    def take(self, rows: Tensor | slice) -> Domains:
        """Some of them."""
        columns = {f.name: _each(lambda t: t[rows], getattr(self, f.name)) for f in fields(self)}
        return Domains(**columns)

    @classmethod
    def joined(cls, parts: Sequence[Domains]) -> Domains:
        """All of them, in order."""
        columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(cls)}
        return cls(**{name: _each(lambda *t: torch.cat(t), *column) for name, column in columns.items()})

    def one_by_one(self) -> list[Domains]:
        """Each alone, in memory of its own."""
        return [self.take(torch.tensor([row], device=self.clause.device)) for row in range(len(self))]


class Packed(NamedTuple):
    """One part as it waits: in little memory, with slopes and multipliers rounded, which may be any."""

    clause: int
    lower: float
    weights: Tensor
    """(R,)."""
    place: Tensor
    """Of the neurons with a sign, flat over the values that ReLUs read; (k,) int32."""
    sign: Tensor
    """(k,) int8."""
    multiplier: Tensor
    """(k,) float32."""
    slopes: Tensor
    """Of the neurons that are unstable on the region, flat over the ReLUs; float16."""


def _each(function: Callable[..., Tensor], *columns: Any) -> Any:
    """A function of tensors, or of those under each key."""
    if isinstance(columns[0], dict):
        return {key: function(*(column[key] for column in columns)) for key in columns[0]}
    return function(*columns)


class Waiting:
    """Parts of one region in little memory, and back.

    Args:
        root: what is known of the region.
        shapes: of the values that have signs, by their numbers.
        sources: by the number of a ReLU, the value that it reads.
    """

    def __init__(self, root: Optimised, shapes: Mapping[int, tuple[int, ...]], sources: Mapping[int, int]) -> None:
        self.shapes, self.sources = shapes, sources
        self.slopes = {number: root.slopes[number][0, 0].flatten() for number in sources}
        """Of stable neurons, where they do not matter."""
        self.uncertain = {number: _unstable(root.values[source]) for number, source in sources.items()}

    def packed(self, domains: Domains) -> list[Packed]:
        """Each of them as it waits."""
        signs, multipliers = (
            _flat(column, self.shapes, len(domains)) for column in (domains.signs, domains.multipliers)
        )
        each = {n: domains.slopes[n].flatten(1)[:, place] for n, place in self.uncertain.items()}
        slopes, found = _flat(each, self.sources, len(domains)).half(), []
        for row, (clause, lower) in enumerate(zip(domains.clause.tolist(), domains.lower.tolist(), strict=True)):
            place = signs[row].nonzero().squeeze(1)
            held = place.int(), signs[row][place].to(torch.int8), multipliers[row][place].float()
            found.append(Packed(clause, lower, domains.weights[row].clone(), *held, slopes[row].clone()))
        return found

    def unpacked(self, parts: Sequence[Packed]) -> Domains:
        """All of them together."""
        count, weights = len(parts), torch.stack([part.weights for part in parts])
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        rows = torch.repeat_interleave(torch.tensor([len(part.place) for part in parts])).to(weights.device)
        place = rows, torch.cat([part.place for part in parts]).long()
        signs = weights.new_zeros(count, sum(sizes), dtype=torch.int8)
        signs[place] = torch.cat([part.sign for part in parts])
        multipliers = weights.new_zeros(count, sum(sizes))
        multipliers[place] = torch.cat([part.multiplier for part in parts]).to(weights)
        slopes, known = {}, torch.stack([part.slopes for part in parts]).to(weights)
        for number, uncertain in self.uncertain.items():
            whole = self.slopes[number].repeat(count, 1)
            whole[:, uncertain], known = known[:, : len(uncertain)], known[:, len(uncertain) :]
            slopes[number] = whole.view(count, *self.shapes[self.sources[number]])

        def spread(flat: Tensor) -> dict[int, Tensor]:
            columns = zip(self.shapes.items(), flat.split(sizes, 1), strict=True)
            return {source: column.reshape(count, *shape) for (source, shape), column in columns}

        return Domains(
            torch.tensor([part.clause for part in parts], device=weights.device),
            weights.new_tensor([part.lower for part in parts]),
            weights,
            spread(signs),
            slopes,
            spread(multipliers),
        )


def _flat(column: Mapping[int, Tensor], order: Iterable[int], count: int) -> Tensor:
    """(count, entries of all)."""
    parts = [column[key].flatten(1) for key in order]
    return torch.cat(parts, 1) if parts else torch.zeros(count, 0)


def _unstable(value: Interval) -> Tensor:
    """The neurons that a ReLU may treat either way on the region of one example, flat; (k,)."""
    return ((value.lower < 0) & (value.upper > 0)).flatten().nonzero().squeeze(1)
