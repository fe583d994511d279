"""The table of the local-Lipschitz line: what each defence reaches on training and test images, over seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pandas as pd

from holdfast.component import Component, distinct_labels
from holdfast.experiments.records.record import latex as latex_table
from holdfast.experiments.runs.folder import Run
from holdfast.numbers import Mean

COLUMNS = {
    "train": "train acc.",
    "test": "test acc.",
    "adversarial": "adv. test acc.",
    "lipschitz": "test Lipschitz",
    "gap": "gap",
    "adversarial_gap": "adv. gap",
}
"""By the name of a column its heading; accuracies and gaps in per cent."""


def defence_table(runs: Sequence[Run]) -> pd.DataFrame:
    """One row for all finished runs that differ in nothing but the seed.

    Accuracies under attack are those under all of a run's attacks. ``NAME`` is the mean over those seeds that have
    the number, ``NAME_half`` half its 95 % interval (Student's t; NaN for a single one), ``NAME_n`` how many they
    are. ``note`` tells where the number of processes that trained changed the numbers.
    """
    once: dict[str, dict[int, Run]] = {}
    for run in runs:
        if run.finished and run.experiment.objective is not None:
            recipe = json.dumps(run.experiment.model_dump(mode="json", exclude={"seed", "engine"}), sort_keys=True)
            once.setdefault(recipe, {})[run.experiment.seed] = run  # of the same experiment the last
    groups = {recipe: list(members.values()) for recipe, members in once.items()}
    firsts = [members[0].experiment for members in groups.values()]
    models = _labels([one.model for one in firsts])
    defences = _labels([one.objective for one in firsts if one.objective])
    rows = []
    for members, one, model, defence in zip(groups.values(), firsts, models, defences, strict=True):
        numbers = pd.DataFrame([_numbers(run.result) for run in members], columns=list(COLUMNS))
        row: dict[str, Any] = {
            "data": one.data.short_name,
            "model": model,
            "threat": str(one.test_threat),
            "defence": defence,
        }
        row |= {"seeds": len(members), "run": members[0].path.name}
        row["note"] = "; ".join(dict.fromkeys(run.note for run in members if run.note))
        for name, values in numbers.items():
            row |= {f"{name}{part}": value for part, value in Mean.of(values.to_numpy()).columns.items()}
        rows.append(row)
    table = pd.DataFrame(rows)
    return table.sort_values(["data", "model", "threat"], kind="stable", ignore_index=True) if rows else table


def _labels(members: Sequence[Component]) -> list[str]:
    """Of each its name, and the settings in which its namesakes differ."""
    different: list[Component] = []
    for member in members:
        if member not in different:
            different.append(member)
    labels = distinct_labels(different)
    return [labels[different.index(member)] for member in members]


def _numbers(result: dict[str, Any]) -> dict[str, float]:
    train = result.get("train", {})

    def percent(part: dict[str, Any], *path: str) -> float:
        value: Any = part
        for key in path:
            value = value.get(key) if value else None
        return float("nan") if value is None else 100 * float(value)

    standard, attacked = percent(result, "standard"), percent(result, "bracket", "attacked")
    of_train, attacked_of_train = percent(train, "standard"), percent(train, "bracket", "attacked")
    return {
        "train": of_train,
        "test": standard,
        "adversarial": attacked,
        "lipschitz": percent(result, "local_lipschitz", "mean") / 100,
        "gap": of_train - standard,
        "adversarial_gap": attacked_of_train - attacked,
    }


def cells(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Headings and rows as text: columns that say something, numbers with ± where known, and with n where they are
    not over all seeds of the row."""
    words = [
        name for name in ("data", "model", "threat", "defence") if name == "defence" or table[name].nunique() > 1
    ]
    if table.duplicated(["data", "model", "threat", "defence"]).any():
        words.append("run")  # they differ in something else
    if table["note"].any():
        words.append("note")
    many = ["seeds"] if (table["seeds"] > 1).any() else []
    rows = [
        [
            *(str(row[name]) for name in (*words, *many)),
            *(_cell(row, name) for name in COLUMNS),
        ]
        for _, row in table.iterrows()
    ]
    return [*words, *many, *COLUMNS.values()], rows


def _cell(row: Any, name: str) -> str:
    keys = {"lipschitz": "local_lipschitz.mean", "gap": "gap", "adversarial_gap": "attacked_gap"}
    key = keys.get(name, "standard")
    scale = 1 if name == "lipschitz" else 100
    return Mean(row[name] / scale, row[f"{name}_half"] / scale, row[f"{name}_n"]).text(key, row["seeds"])


def latex(table: pd.DataFrame) -> str:
    """The table for a paper, with the rules of booktabs."""
    headings, rows = cells(table)
    return latex_table(headings, rows, len(COLUMNS) + ("seeds" in headings))
