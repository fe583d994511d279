"""The axes of a sweep: what ``key=a,b,c``, ``key=loguniform(1e-3,10)`` and ``key=of(60000 / other.key)`` mean."""

from __future__ import annotations

import ast
import math
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from holdfast.component import parse_number
from holdfast.experiments.formulas import compute
from holdfast.experiments.recipes.overrides import parse_yaml

_CALL = re.compile(r"(range|uniform|loguniform|of)\((.*)\)\s*", re.DOTALL)
MOST_VALUES = 10_000


@dataclass(frozen=True)
class Listed:
    """Overrides of which each run takes one; a single one is for all runs."""

    choices: tuple[dict[str, Any], ...]
    """Values by dotted keys."""
    name: str = ""
    """What the choice is called, where its values have words of their own."""
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Drawn:
    """A key whose value is drawn for every trial, uniformly or by its logarithm."""

    key: str
    low: float
    high: float
    logarithm: bool

    def draw(self, trial: int) -> float:
        """The same for the same key and trial, however many there are; four digits."""
        share = np.random.default_rng([zlib.crc32(self.key.encode()), trial]).random()
        if self.logarithm:
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        return float(f"{value:.4g}")


@dataclass(frozen=True)
class Derived:
    """A key that is computed from others: ``of(60000 / data.train_size)``."""

    key: str
    formula: str

    def value(self, settings: Mapping[str, Any]) -> float:
        """By the settings that stand before it; a whole number where it is one."""
        text = f"{self.key}=of({self.formula})"

        def number(key: str) -> float:
            value: Any = settings
            for part in key.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            try:
                return parse_number(value)
            except ValueError:
                raise ValueError(f"{text}: {key} is {value!r}, not a number") from None

        try:
            found = float(compute(self.formula, number, _FUNCTIONS, text))
        except (TypeError, OverflowError) as fault:
            raise ValueError(f"{text}: {fault}") from fault
        if not math.isfinite(found):
            raise ValueError(f"{text} is {found}")
        return int(found) if found.is_integer() else found


Axis = Listed | Drawn | Derived


def parse_axis(text: str) -> Axis:
    """``key=a,b,c``; ``key=range(16,1024,*2)`` or ``range(0,10,2)``, both ends included; ``key=uniform(0,1)``,
    ``key=loguniform(1e-3,10)``; ``key=of(60000 / other.key)``; ``one.key+other.key=[1,2],[3,4]`` change together.

    Values are YAML; ``key=[a,b]`` is one value that is a list.

    Raises:
        ValueError: none of these.
    """
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ValueError(f"expected KEY=VALUE,VALUE..., given {text!r}")
    keys, value = tuple(part.strip() for part in key.split("+")), value.strip()
    if not all(keys) or len(set(keys)) < len(keys):
        raise ValueError(f"{text!r}: expected different keys, KEY+OTHER=[..],[..]")
    call = _CALL.fullmatch(value)
    if call and len(keys) > 1:
        raise ValueError(f"{text!r}: keys that change together take lists of values, one for each key")
    if call and call[1] == "of":
        try:
            ast.parse(call[2], mode="eval")
        except SyntaxError as fault:
            raise ValueError(f"{text!r} is no formula: numbers, dotted keys, + - * / // **") from fault
        return Derived(key, call[2])
    if call and call[1] == "range":
        return Listed(tuple({key: number} for number in _range(call[2], text)))
    if call:
        ends = [parse_number(part) for part in call[2].split(",")]
        logarithm = call[1] == "loguniform"
        if len(ends) != 2 or ends[0] >= ends[1] or (logarithm and ends[0] <= 0):
            raise ValueError(f"{text!r}: expected {call[1]}(LOW, HIGH){' above 0' if logarithm else ''}")
        return Drawn(key, ends[0], ends[1], logarithm)
    values = parse_yaml(key, f"[{value}]")
    if not values:
        raise ValueError(f"{text!r} has no values")
    if len(keys) == 1:
        return Listed(tuple({key: one} for one in values))
    for one in values:
        if not isinstance(one, list) or len(one) != len(keys):
            raise ValueError(f"{text!r}: expected lists of {len(keys)} values, [..],[..], given {one!r}")
    return Listed(tuple(dict(zip(keys, one, strict=True)) for one in values))


def _range(inside: str, text: str) -> list[float]:
    parts = [part.strip() for part in inside.split(",")]
    if len(parts) not in (2, 3):
        raise ValueError(
            f"{text!r}: expected range(FIRST, LAST), range(FIRST, LAST, STEP) or range(FIRST, LAST, *FACTOR)"
        )
    first, last = parse_number(parts[0]), parse_number(parts[1])
    step = parts[2] if len(parts) == 3 else "1"
    by = parse_number(step.removeprefix("*"))
    multiplies = step.startswith("*")
    if first > last or (multiplies and (by <= 1 or first <= 0)) or by <= 0:
        raise ValueError(f"{text!r} never gets from {first:g} to {last:g}")
    count = math.log(last / first) / math.log(by) if multiplies else (last - first) / by
    if count > MOST_VALUES:
        raise ValueError(f"{text!r} has more than {MOST_VALUES} values")
    steps = range(math.floor(count * (1 + 1e-12) + 1e-12) + 1)
    numbers = [first * by**number if multiplies else first + by * number for number in steps]
    return [int(number) if float(number).is_integer() else float(f"{number:.12g}") for number in numbers]


_FUNCTIONS: dict[str, Callable[..., Any]] = {"round": round, "min": min, "max": max}


def in_words(value: Any) -> str:
    """A value of a recipe, short."""
    if isinstance(value, Mapping):
        inner = ", ".join(f"{k}={in_words(v)}" for k, v in value.items() if k != "name")
        name = str(value.get("name", ""))
        return f"{name}({inner})" if name and inner else name or inner
    if isinstance(value, list):
        return "[" + ", ".join(map(in_words, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)
