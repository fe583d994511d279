"""Some of the records, in order, as rows; and tables for a paper."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from holdfast.component import nearest, parse_number
from holdfast.experiments.records.record import Record

_CONDITION = re.compile(r"(>=|<=|!=|=|>|<)(.*)", re.DOTALL)


def known_keys(records: Iterable[Record]) -> set[str]:
    """Every name that any of the records has."""
    return {key for record in records for key in record.values}


def check_keys(records: Sequence[Record], keys: Iterable[str]) -> None:
    """Refuse a name that no record has.

    Raises:
        ValueError: with the nearest names.
    """
    known = known_keys(records)
    for key in keys:
        if records and key not in known:
            raise ValueError(f"no run has {key!r}; {nearest(key, known)}")


def select(records: Sequence[Record], where: str) -> list[Record]:
    """The records that meet all conditions, such as ``objective=trades data.train_size>=1000 threat.eps=8/255``.

    ``=`` takes several values separated by commas, ``none`` is an empty setting; a record that lacks the name meets
    only ``!=``.

    Raises:
        ValueError: not a condition, or a name that no record has.
    """
    known = known_keys(records)
    conditions = [_condition(text, known) for text in shlex.split(where)]
    check_keys(records, [key for key, _, _ in conditions])
    return [one for one in records if all(_meets(one.values.get(key), op, to) for key, op, to in conditions)]


def _condition(text: str, known: Iterable[str]) -> tuple[str, str, str]:
    """Name, operator and value; a name may itself hold an operator, such as ``certified.bounds(method=bcp)``."""
    for key in sorted((key for key in known if text.startswith(key)), key=len, reverse=True):
        if match := _CONDITION.fullmatch(text.removeprefix(key)):
            return key, match[1], match[2]
    if not (match := _CONDITION.search(text)) or not match.start():
        raise ValueError(f"{text!r} is no condition: expected KEY=VALUE, or !=, <, <=, >, >=")
    return text[: match.start()], match[1], match[2]


def _meets(value: Any, operator: str, text: str) -> bool:
    if operator in ("=", "!="):
        return any(_equal(value, part) for part in (text, *text.split(","))) == (operator == "=")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    other = parse_number(text)
    return {"<": value < other, "<=": value <= other, ">": value > other, ">=": value >= other}[operator]


def _equal(value: Any, text: str) -> bool:
    if value is None or isinstance(value, bool):
        return text.lower() == str(value).lower()
    if isinstance(value, int | float):
        try:
            return abs(value - parse_number(text)) <= 1e-9 * abs(value)
        except ValueError:
            return False
    return str(value) == text


def order(records: Sequence[Record], key: str) -> list[Record]:
    """Sorted by a name, ``-name`` for the largest first; records without it last.

    Raises:
        ValueError: a name that no record has.
    """
    downwards, key = key.startswith("-"), key.removeprefix("-")
    check_keys(records, [key])
    having = [record for record in records if record.values.get(key) is not None]
    numbers = all(isinstance(record.values[key], int | float) for record in having)
    having.sort(key=lambda one: one.values[key] if numbers else str(one.values[key]), reverse=downwards)
    return having + [record for record in records if record.values.get(key) is None]


def rows(records: Sequence[Record], keys: Sequence[str]) -> Iterator[list[Any]]:
    """Of each record its name and the values of these keys."""
    for record in records:
        yield [record.name, *(record.values.get(key) for key in keys)]


def latex(headings: Sequence[str], cells: Sequence[Sequence[str]], numbers: int) -> str:
    """A table of text for a paper, with the rules of booktabs; the last ``numbers`` columns stand to the right."""
    escaped = [[_escape(cell) for cell in line] for line in (headings, *cells)]
    lines = [
        rf"\begin{{tabular}}{{{'l' * (len(headings) - numbers)}{'r' * numbers}}}",
        r"\toprule",
        " & ".join(escaped[0]) + r" \\",
        r"\midrule",
        *(" & ".join(line) + r" \\" for line in escaped[1:]),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines)


def _escape(cell: str) -> str:
    return re.sub(r"([&%$#_{}])", r"\\\1", cell).replace("–", "--").replace("±", r"$\pm$")
