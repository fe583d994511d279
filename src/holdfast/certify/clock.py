"""The time that an answer may take."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    """The time that is left."""

    end: float
    """As ``time.perf_counter`` counts."""

    @classmethod
    def of(cls, seconds: float | None) -> Clock:
        """None for no limit."""
        return cls(math.inf if seconds is None else time.perf_counter() + seconds)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.perf_counter()

    def part(self, share: float) -> Clock:
        """A share of what is left."""
        now = time.perf_counter()
        return Clock(now + share * (self.end - now))

    def going(self) -> bool:
        """Whether some is left."""
        return self.left > 0
