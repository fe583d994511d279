"""What an evaluation tells of a stage on its way."""

from __future__ import annotations

import time
from collections.abc import Callable


def sometimes(tell: Callable[[int, int], None], count: int) -> Callable[[int, int], None]:
    """Passes on what is told of each further tenth of the examples, and where that takes long every 10 seconds."""
    told, last = count, time.monotonic()

    def perhaps(left: int, spent: int) -> None:
        nonlocal told, last
        if left and (told - left >= count / 10 or (left < told and time.monotonic() > last + 10)):
            told, last = left, time.monotonic()
            tell(left, spent)

    return perhaps


def tell_samples(report: Callable[[str, int, int], None], name: str, left: int, spent: int) -> None:
    report(f"{name} ({spent} samples)" if spent else name, -1, left)
