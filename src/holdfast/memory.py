"""Work in pieces that fit into the memory of the device: out of memory halves them, and the work goes on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

R = TypeVar("R")
_fitting: dict[str, int] = {}
"""By place, the size that the process has come down to."""


def in_pieces(place: str, count: int, size: int, work: Callable[[Tensor], R]) -> Iterator[tuple[Tensor, R]]:
    """The numbers 0..count − 1 in order, at most ``size`` at a time, and the work on each piece.

    Where a piece does not fit into the device's memory, its halves are tried, and later pieces of the process are
    no larger; it is said once. What is computed of an example must not hang on the piece that it is in.

    Args:
        place: where the memory is needed, in words that the warning can use.

    Raises:
        torch.OutOfMemoryError: a single example does not fit.
    """
    at = 0
    while at < count:
        numbers = torch.arange(at, min(at + size, at + _fitting.get(place, size), count))
        result = _tried(work, numbers)
        if result is None:
            _halve(place, len(numbers))
            continue
        yield numbers, result[0]
        at += len(numbers)


def _tried(work: Callable[[Tensor], R], numbers: Tensor) -> tuple[R] | None:
    """The result; None where it does not fit. What the failed work held is free once this has returned."""
    try:
        return (work(numbers),)
    except torch.OutOfMemoryError:
        if len(numbers) == 1:
            raise
        return None


def _halve(place: str, size: int) -> None:
    if place not in _fitting:
        warnings.warn(
            f"{place}: {size} examples at once do not fit into the device's memory; going on with fewer",
            stacklevel=2,
        )
    _fitting[place] = size // 2
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
