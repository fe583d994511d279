"""Runs beside one another: means over seeds, 95 % intervals, the best of several settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from holdfast.experiments.records.record import Record
from holdfast.experiments.records.selection import check_keys
from holdfast.numbers import Mean

Direction = Literal["max", "min"]


def compare(
    records: Sequence[Record], *, y: Sequence[str], by: Sequence[str] = (), best: str | None = None
) -> pd.DataFrame:
    """One row for each combination of values of ``by``: ``seeds``, and of every ``y`` the mean over those that have
    it, ``NAME_half``, half its 95 % interval (Student's t; NaN for one seed), and ``NAME_n``, how many have it.

    Args:
        records: what is not finished is left out, as is what lacks a name of ``by`` or all of ``y``; what lacks
            some of ``y`` has NaN there. A setting that is empty is ``none`` in ``by``.
        best: where runs of a row differ in more than their seed, take those whose mean of this name is largest, or
            smallest for ``-name``. It should be of the validation, such as ``last.validation_certified``.

    Raises:
        ValueError: a name that no run has, one that is no number, or runs of a row that differ in more than their
            seed though no ``best`` is given.
    """
    downwards, goal = (best or "").startswith("-"), (best or "").removeprefix("-")
    records = [one for one in records if one.status in ("finished", "old")]
    if not records:
        raise ValueError("there are no finished runs")
    check_keys(records, [*y, *by, *([goal] if goal else [])])
    having = [
        one
        for one in records
        if all(key in one.values for key in by) and any(one.values.get(key) is not None for key in y)
    ]
    cells: dict[tuple[str, ...], list[Record]] = {}
    for one in having:
        cell = tuple(json.dumps(one.values[key], sort_keys=True) for key in by)
        cells.setdefault(cell, []).append(one)
    rows = []
    for found in cells.values():
        groups = by_recipe(found)
        if len(groups) > 1 and not goal:
            raise ValueError(_differences([group[0] for group in groups], by))
        if goal:
            known = [(mean_of(group, goal).value, group) for group in groups]
            ranked = [((-1 if downwards else 1) * value, group) for value, group in known if not np.isnan(value)]
            if not ranked:
                continue
            group = max(ranked, key=lambda pair: pair[0])[1]
        else:
            group = groups[0]
        row = {key: _as_label(group[0].values[key]) for key in by} | {"seeds": len(group), "run": group[0].name}
        for key in y:
            row |= {key + part: value for part, value in mean_of(group, key).columns.items()}
        rows.append(row)
    parts = [key + part for key in y for part in ("", "_half", "_n")]
    return pd.DataFrame(rows, columns=[*by, "seeds", "run", *parts])


def by_recipe(records: Sequence[Record]) -> list[list[Record]]:
    """Those that differ in nothing but their seed together; of one recipe and seed the last."""
    groups: dict[str, dict[Any, Record]] = {}
    for one in records:
        recipe = json.dumps(one.recipe, sort_keys=True, default=str)
        groups.setdefault(recipe, {})[one.values.get("seed", one.name)] = one
    return [list(group.values()) for group in groups.values()]


def mean_of(group: Sequence[Record], key: str) -> Mean:
    """Of a number, over those that have it.

    Raises:
        ValueError: it is no number.
    """
    return Mean.of([_number(one, key) for one in group])


def labels(records: Sequence[Record], component: str) -> list[str]:
    """What each has for a component, such as ``objective``: its name, and in which settings namesakes differ."""
    found = []
    for one in records:
        namesakes = [other.values for other in records if other.values.get(component) == one.values.get(component)]
        own = {key: value for key, value in one.values.items() if key.startswith(f"{component}.")}
        words = [
            f"{key.removeprefix(f'{component}.')}={_as_label(value)}"
            for key, value in own.items()
            if not key.endswith(".name") and any(other.get(key) != value for other in namesakes)
        ]
        found.append(str(one.values.get(component)) + (f"({','.join(words)})" if words else ""))
    return found


def _as_label(value: Any) -> Any:
    """A setting as a cell: text where it is empty or a list."""
    return "none" if value is None else json.dumps(value) if isinstance(value, list) else value


def _number(record: Record, key: str) -> float:
    value = record.values.get(key)
    if value is None:
        return float("nan")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} of {record.name} is no number: {value!r}")
    return float(value)


def _differences(records: Sequence[Record], by: Sequence[str]) -> str:
    keys = {key for one in records for key in one.recipe if key not in by}
    different = sorted(
        key for key in keys if len({json.dumps(one.recipe.get(key), default=str) for one in records}) > 1
    )
    row = ", ".join(f"{key}={records[0].values[key]}" for key in by) or "these"
    return (
        f"{len(records)} experiments with {row} differ in {', '.join(different[:6])}: a mean over them says "
        "nothing; narrow them with --where, tell them apart with --by, or choose with --best"
    )


def read_curves(records: Sequence[Record], by: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Of each run its sandwich curve, by what tells it apart; where that is not enough, by its name, too.

    Raises:
        FileNotFoundError: none of them drew one.
    """
    curves: dict[str, pd.DataFrame] = {}
    for one in records:
        path = (one.answers or one.path) / "figures" / "sandwich.csv"
        if path.is_file():
            label = ", ".join(str(one.values.get(key)) for key in by)
            curves[f"{label} ({one.name[:6]})" if label in curves or not label else label] = pd.read_csv(path)
    if not curves:
        raise FileNotFoundError("none of these runs drew its curve: train with evaluation.curve_points=8")
    return curves
