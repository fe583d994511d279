"""How far apart the classes are: the exact distance to the nearest example of another class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.component import nearest
from holdfast.inference import quiet_door

ORDERS = {"linf": float("inf"), "l2": 2.0, "l1": 1.0}
FIRST = 128
"""Coordinates of the first comparison, those of largest variance; later ones take four times as many each."""
CANDIDATES = 128
"""The nearest by the first comparison; compared whole, so that there is a distance for the others to undercut."""
BLOCK = 2048
"""Rivals that are compared with an eighth as many queries at a time."""
GATHERED = 16
"""Candidates of a query that are compared whole at a time."""
EXACTLY = "donot_use_mm_for_euclid_dist"


@dataclass(frozen=True)
class Separation:
    """For each of M queries the nearest example of another class."""

    distance: Tensor
    """(M,), in the type of the inputs; inf where there is no other class."""
    neighbour: Tensor
    """Its number, (M,) int64, one of several at the same distance; −1 where there is none."""


@quiet_door
@torch.no_grad()
def separation(
    x: Tensor,
    y: Tensor,
    norm: str = "linf",
    *,
    queries: Tensor | None = None,
    query_labels: Tensor | None = None,
    memory: int = 256 * 2**20,
    on_progress: Callable[[int, int], None] | None = None,
) -> Separation:
    """The nearest x of another class for every query: min over y_j ≠ y_i of ‖q_i − x_j‖.

    Exact: any subset of the coordinates bounds the distance from below, so that most pairs are discarded after the
    coordinates of largest variance, and the rest are compared on more and more of them.

    Args:
        x: examples (N, ...), floating, or uint8, which count as k / 255.
        y: labels (N,).
        norm: ``linf``, ``l2`` or ``l1``.
        queries: (M, ...) and their labels (M,); each x itself by default.
        memory: bytes that one portion of queries may take, beside two copies of the inputs.
        on_progress: told how many queries are done, of how many.

    Raises:
        ValueError: an unknown norm, or shapes that do not fit.
    """
    if norm not in ORDERS:
        raise ValueError(f"{norm!r} is not a norm; {nearest(norm, ORDERS)}")
    if (queries is None) != (query_labels is None):
        raise ValueError("queries and query_labels come together")
    points, wanted = _flat(x), x if queries is None else queries
    labels = y if query_labels is None else query_labels
    if x.shape[1:] != wanted.shape[1:] or len(y) != len(x) or len(labels) != len(wanted):
        raise ValueError(
            f"{tuple(x.shape)} inputs with {len(y)} labels and queries {tuple(wanted.shape)} with {len(labels)}"
        )
    sought = points if queries is None else _flat(queries)
    found = torch.full((len(sought),), torch.inf, dtype=points.dtype, device=points.device)
    which = torch.full((len(sought),), -1, dtype=torch.int64, device=points.device)
    if len(points) and len(sought):
        order = points.var(0, correction=0).argsort(descending=True) if len(points) > 1 else slice(None)
        points, sought = points[:, order].contiguous(), sought[:, order].contiguous()
        for label in labels.unique().tolist():
            mine = (labels == label).nonzero().squeeze(1)
            others = (y != label).nonzero().squeeze(1)
            if not len(others):
                continue
            rivals = points[others]
            size = points.element_size()
            portion = max(1, memory // (4 * size * max(len(others), GATHERED * points.shape[1])))
            for rows in mine.split(portion):
                best, index = _nearest(sought[rows], rivals, ORDERS[norm], memory)
                found[rows], which[rows] = best, others[index]
                if on_progress:
                    on_progress(int((which >= 0).sum()), len(sought))
    return Separation(found, which)


def _flat(x: Tensor) -> Tensor:
    return (x.float() / 255 if x.dtype == torch.uint8 else x).flatten(1)


def _nearest(queries: Tensor, rivals: Tensor, order: float, memory: int) -> tuple[Tensor, Tensor]:
    """The exact nearest rival of each query: distance and number."""
    dimensions = queries.shape[1]
    stop = min(FIRST, dimensions)
    if order == torch.inf:
        partial = _largest_differences(queries[:, :stop], rivals[:, :stop])
    else:
        partial = torch.cdist(queries[:, :stop], rivals[:, :stop], order, compute_mode=EXACTLY)
    # A maximum is the same however it is computed; sums may differ in their last places.
    slack = 1.0 if order == torch.inf else 1 - 1e-5
    best = torch.full_like(queries[:, 0], torch.inf)
    index = torch.zeros_like(best, dtype=torch.int64)
    for near in partial.topk(min(CANDIDATES, len(rivals)), dim=1, largest=False).indices.split(GATHERED, dim=1):
        exact, place = torch.linalg.vector_norm(queries[:, None] - rivals[near], order, dim=2).min(1)
        index = torch.where(exact < best, near.gather(1, place[:, None])[:, 0], index)
        best = torch.minimum(best, exact)
    row, column = (slack * partial < best[:, None]).nonzero().unbind(1)
    lower = partial[row, column]
    while stop < dimensions and len(row):
        start, stop = stop, min(4 * stop, dimensions)
        more = _distances(queries[:, start:stop], rivals[:, start:stop], row, column, order, memory)
        lower = torch.maximum(lower, more) if order == torch.inf else _added(lower, more, order)
        keep = slack * lower < best[row]
        row, column, lower = row[keep], column[keep], lower[keep]
    exact = _distances(queries, rivals, row, column, order, memory)
    smallest = best.scatter_reduce(0, row, exact, "amin")
    index[row[exact == smallest[row]]] = column[exact == smallest[row]]
    return smallest, index


def _largest_differences(queries: Tensor, rivals: Tensor) -> Tensor:
    """max |q − r| of all pairs, coordinate by coordinate on blocks that stay in the cache: faster than cdist."""
    result = queries.new_empty(len(queries), len(rivals))
    for columns in torch.arange(len(rivals), device=rivals.device).split(BLOCK):
        first, last = int(columns[0]), int(columns[-1]) + 1
        block = rivals[first:last].T.contiguous()
        for rows in torch.arange(len(queries), device=queries.device).split(BLOCK // 8):
            start, stop = int(rows[0]), int(rows[-1]) + 1
            part = queries.new_zeros(stop - start, last - first)
            for coordinate, own in zip(block, queries[start:stop].T, strict=True):
                torch.maximum(part, (coordinate - own[:, None]).abs_(), out=part)
            result[start:stop, first:last] = part
    return result


def _distances(queries: Tensor, rivals: Tensor, row: Tensor, column: Tensor, order: float, memory: int) -> Tensor:
    """Of pairs, in portions."""
    portion = max(1, memory // (4 * queries.element_size() * max(1, queries.shape[1])))
    pairs = zip(row.split(portion), column.split(portion), strict=True)
    parts = [torch.linalg.vector_norm(queries[i] - rivals[j], order, dim=1) for i, j in pairs]
    return torch.cat(parts) if parts else queries.new_zeros(0)


def _added(first: Tensor, second: Tensor, order: float) -> Tensor:
    return first + second if order == 1 else (first.square() + second.square()).sqrt()
