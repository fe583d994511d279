"""Numbers over seeds: their mean, its interval, how many there are, and how all three are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

NONE = "–"
SHARES = ("standard", "attacked", "certified", "not_surely_wrong", "bracket", "certified_at")
"""First parts of the dotted names of accuracies."""
DIFFERENCES = ("gap", "attacked_gap")
"""Names of differences of two accuracies."""


class Mean(NamedTuple):
    """Of the seeds that have a number."""

    value: float
    """NaN where no seed has one."""
    half: float
    """Half the 95 % interval of the mean (Student's t); NaN for one value."""
    n: int

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Mean:
        """Those that are not NaN."""
        known = np.asarray(values, dtype=float)
        known = known[~np.isnan(known)]
        count = len(known)
        if count < 2:
            return cls(float(known[0]) if count else float("nan"), float("nan"), count)
        half = stats.t.ppf(0.975, count - 1) * known.std(ddof=1) / np.sqrt(count)
        return cls(float(known.mean()), float(half), count)

    @property
    def columns(self) -> dict[str, Any]:
        """What its column is called behind the name of the number."""
        return {"": self.value, "_half": self.half, "_n": self.n}

    def text(self, key: str, seeds: int) -> str:
        """As a cell of a table: shares in per cent; the number of values where it is not that of the seeds, or
        where the interval of an accuracy leaves 0 to 100 per cent, as that of two seeds may.

        Args:
            key: the dotted name of the number.
            seeds: how many the row stands for.
        """
        if np.isnan(self.value):
            return NONE
        scale = scale_of(key)
        form, form_half = (".2f", ".2f") if scale == 100 else (".4g", ".2g")
        text = f"{scale * self.value:{form}}"
        if not np.isnan(self.half):
            text += f" ± {scale * self.half:{form_half}}"
        return f"{text} (n={self.n})" if self.n != seeds or leaves_range(key, *self[:2]) else text


def scale_of(key: str) -> int:
    """100 for what is shown in per cent, 1 for any other number."""
    return 100 if is_share(key) or is_difference(key) else 1


def is_share(key: str) -> bool:
    """Whether a dotted name is that of an accuracy, in 0 to 1."""
    first = key.removeprefix("train.").removeprefix("last.validation_").split(".")[0]
    return first in SHARES and not key.endswith("radius")


def is_difference(key: str) -> bool:
    """Whether it is that of a difference of two accuracies."""
    return key in DIFFERENCES


def leaves_range(key: str, value: Any, half: Any) -> Any:
    """Whether the interval of an accuracy reaches beyond 0 or 1, as no accuracy can; of numbers or arrays."""
    return is_share(key) & ((value - half < -1e-9) | (value + half > 1 + 1e-9))
