"""What a paper claims, as a number of a study's own table that its runs answer: seen, not seen, or open."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from pydantic import model_validator

from holdfast.component import Settings, parse_number
from holdfast.experiments.formulas import compute
from holdfast.experiments.records.record import Record
from holdfast.numbers import Mean

Answer = Literal["seen", "not seen", "open"]


class Cells(Settings):
    """Numbers of some rows of a study's table."""

    of: str
    """The dotted name of the number, such as ``certified``."""
    where: dict[str, Any] = {}
    """Labels that the rows have; all rows by default."""
    along: str = ""
    """What puts several rows in order, such as ``data.train_size``; without it one row is meant, or the order says
    nothing."""


class Claim(Settings):
    """A sentence of a paper, as an inequality."""

    says: str
    """The claim in a sentence."""
    cells: dict[str, Cells]
    """By the names of the formula the numbers that it reads: one, or several in a row."""
    number: str
    """A formula: + - * / **, min, max, mean, first, last, tail(x, n), log2, slope(x, y) of the least-squares line,
    and spearman(x, y), the correlation of ranks."""
    above: float | None = None
    """It is true if the number is larger than this."""
    below: float | None = None
    """It is true if the number is smaller than this."""
    exact: bool = False
    """Whether the number has nothing random, so that one value answers."""
    needs: str = ""
    """What else would have to be run where the data at hand cannot decide it, as digits often cannot."""

    @model_validator(mode="after")
    def _one_side(self) -> Self:
        if (self.above is None) == (self.below is None):
            raise ValueError("a claim is true above a number or below one")
        self._rehearse()
        return self

    def _rehearse(self) -> None:
        """Compute the formula of numbers that are all different, to see that it is one."""
        numbers = itertools.count(3.7, 1.3)

        def known(name: str) -> float:
            if name not in self.cells:
                raise ValueError(f"{self.number}: {name} is none of {', '.join(self.cells)}")
            return next(numbers)

        compute(self.number, known, dict.fromkeys(FUNCTIONS, lambda *values: next(numbers)))

    @property
    def condition(self) -> str:
        """The inequality as it is shown."""
        return f"{self.number} {'<' if self.above is None else '>'} {self.limit:g}"

    @property
    def limit(self) -> float:
        return self.below if self.below is not None else self.above if self.above is not None else 0.0


@dataclass(frozen=True)
class Answered:
    """What a study's runs say of a claim."""

    claim: Claim
    answer: Answer
    number: Mean
    """Over seeds."""
    why: str
    """Of an open one, what would decide it."""

    @property
    def plain(self) -> dict[str, Any]:
        """As JSON."""
        numbers = {"number": self.number.value, "half": self.number.half, "n": self.number.n}
        known = {key: None if np.isnan(value) else value for key, value in numbers.items()}
        return {
            "claim": self.claim.says,
            "condition": self.claim.condition,
            "answer": self.answer,
            **known,
            "why": self.why,
        }

    @property
    def interval(self) -> str:
        """The number with its 95 % interval over seeds."""
        if np.isnan(self.number.value):
            return "–"
        text = f"{self.number.value:.3g}"
        return text if np.isnan(self.number.half) else f"{text} ± {self.number.half:.2g} (n={self.number.n})"


def answer(claim: Claim, records: Sequence[Record], *, best: str = "") -> Answered:
    """What these runs say of it: the formula is computed for each seed by itself, the answer is of the mean's 95 %
    interval (Student's t). Seen or not seen where all of it lies on one side, open where it holds both, or where
    there is one seed only and the number is not exact. A seed of which a row is missing does not count; where the
    formula has no value for one, nothing is answered.

    Args:
        records: of whole seeds; what is not finished is left out.
        best: of several settings in one row, that of the largest number of this name counts (``Study.best``).
    """
    seeds: dict[Any, list[Record]] = {}
    for one in records:
        if one.status in ("finished", "old"):
            seeds.setdefault(one.values.get("seed"), []).append(one)
    values = [_number(claim, found, best) for found in seeds.values()]
    known = [value for value in values if value is not None]
    if not np.isfinite(known).all():
        return Answered(claim, "open", Mean.of([]), f"{claim.number} has no value for every seed")
    return judged(claim, Mean.of(known))


def judged(claim: Claim, number: Mean) -> Answered:
    """The answer by the mean over seeds of the claim's number."""
    if np.isnan(number.value):
        return Answered(claim, "open", number, claim.needs or "the runs that it reads are not there")
    half = 0.0 if claim.exact else number.half
    if np.isnan(half):
        return Answered(claim, "open", number, claim.needs or "one seed has no interval: run it with three")
    sign = 1 if claim.below is None else -1
    lead = sign * (number.value - claim.limit)
    if lead > half:
        return Answered(claim, "seen", number, "")
    if lead < -half or (lead == 0 and half == 0):
        return Answered(claim, "not seen", number, "")
    return Answered(claim, "open", number, claim.needs or _seeds_needed(number, abs(lead)))


def _seeds_needed(number: Mean, lead: float) -> str:
    """About how many seeds would decide it, if mean and spread stay."""
    if lead == 0:
        return "no number of seeds, if the mean stays"
    spread = number.half * np.sqrt(number.n)  # the quantile falls as seeds are added, so that this is too many
    return f"about {max(number.n + 1, int(np.ceil((spread / lead) ** 2)))} seeds, if mean and spread stay"


def _number(claim: Claim, records: Sequence[Record], best: str) -> float | None:
    """Of one seed's runs; None where a row is missing, NaN or inf where the formula has no value."""
    found = {name: _cells(cells, records, best) for name, cells in claim.cells.items()}
    if any(len(values) == 0 or np.isnan(values).any() for values in found.values()):
        return None

    def lookup(name: str) -> Any:
        return found[name] if claim.cells[name].along else found[name][0]  # numpy's, which divides by 0

    with np.errstate(all="ignore"):
        value = np.asarray(compute(claim.number, lookup, FUNCTIONS), dtype=float)
    if value.size != 1:
        raise ValueError(f"{claim.number} is {value.size} numbers, and a claim is about one")
    return value.item()


def _cells(cells: Cells, records: Sequence[Record], best: str) -> np.ndarray:
    rows: dict[str, Record] = {}
    for one in records:
        if not all(_same(one.values.get(key), value) for key, value in cells.where.items()):
            continue
        place = str(one.values.get(cells.along)) if cells.along else ""
        if place in rows and not best:
            raise ValueError(f"{cells.of}: several runs of a seed fit {cells.where or 'all rows'}; which is meant?")
        if place not in rows or np.fmax(_value(rows[place], best), _value(one, best)) != _value(rows[place], best):
            rows[place] = one
    chosen = list(rows.values())
    if cells.along:
        chosen.sort(key=lambda one: (_value(one, cells.along), str(one.values.get(cells.along))))
    return np.array([_value(one, cells.of) for one in chosen])


def _value(record: Record, key: str) -> float:
    """A number, or a fraction as text; NaN where there is none."""
    try:
        return float(parse_number(record.values.get(key)))
    except ValueError:
        return float("nan")


def _same(own: Any, asked: Any) -> bool:
    if isinstance(asked, list):
        return any(_same(own, one) for one in asked)
    try:
        return parse_number(own) == parse_number(asked)
    except ValueError:
        return str(own) == str(asked)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, of equal values their mean."""
    return np.array([np.sum(values < value) + (np.sum(values == value) + 1) / 2 for value in values])


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    """Of the least-squares line."""
    away = np.asarray(x, float) - np.mean(x)
    return float(away @ np.asarray(y, float) / (away @ away))


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 2:
        return float("nan")
    return float(np.corrcoef(_ranks(np.asarray(x)), _ranks(np.asarray(y)))[0, 1])


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "min": lambda *values: np.min(values),
    "max": lambda *values: np.max(values),
    "mean": np.mean,
    "first": lambda values: values[0],
    "last": lambda values: values[-1],
    "tail": lambda values, count: values[-int(count) :],
    "log2": np.log2,
    "slope": _slope,
    "spearman": _spearman,
}
"""What the formula of a claim may call."""
