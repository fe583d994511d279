"""The table of the local-Lipschitz line: what each defence reaches on training and test images, over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from holdfast.experiments.records.comparison import by_recipe, labels, mean_of
from holdfast.experiments.records.record import Record
from holdfast.experiments.records.selection import latex as latex_table
from holdfast.numbers import Mean, scale_of

COLUMNS = {
    "train": ("train.standard", "train acc."),
    "test": ("standard", "test acc."),
    "adversarial": ("attacked", "adv. test acc."),
    "lipschitz": ("local_lipschitz.mean", "test Lipschitz"),
    "gap": ("gap", "gap"),
    "adversarial_gap": ("attacked_gap", "adv. gap"),
}
"""By the name of a column the dotted name of its number, and its heading; accuracies and gaps in per cent."""
WORDS = ("data", "model", "threat", "defence")


def defence_table(records: Sequence[Record]) -> pd.DataFrame:
    """One row for all finished runs that differ in nothing but the seed.

    Accuracies under attack are those under all of a run's attacks. ``NAME`` is the mean over those seeds that have
    the number, ``NAME_half`` half its 95 % interval (Student's t; NaN for a single one), ``NAME_n`` how many they
    are. ``note`` tells where the number of processes that trained changed the numbers. What was not trained here
    has no row.
    """
    groups = by_recipe([one for one in records if one.status == "finished" and one.values.get("objective")])
    firsts = [group[0] for group in groups]
    rows = []
    for group, model, defence in zip(groups, labels(firsts, "model"), labels(firsts, "objective"), strict=True):
        known = group[0].values
        row: dict[str, Any] = {"data": known["data"], "model": model, "threat": known["threat"], "defence": defence}
        row |= {"seeds": len(group), "run": group[0].name}
        row["note"] = "; ".join(dict.fromkeys(one.values["note"] for one in group if one.values.get("note")))
        for name, (key, _) in COLUMNS.items():
            value, half, count = mean_of(group, key)
            row |= {name: scale_of(key) * value, f"{name}_half": scale_of(key) * half, f"{name}_n": count}
        rows.append(row)
    table = pd.DataFrame(rows)
    return table.sort_values(["data", "model", "threat"], kind="stable", ignore_index=True) if rows else table


def cells(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Headings and rows as text: columns that say something, numbers with ± where known, and with n where they are
    not over all seeds of the row."""
    words = [name for name in WORDS if name == "defence" or table[name].nunique() > 1]
    if table.duplicated([*WORDS]).any():
        words.append("run")  # they differ in something else
    if table["note"].any():
        words.append("note")
    many = ["seeds"] if (table["seeds"] > 1).any() else []
    rows = [
        [*(str(row[name]) for name in (*words, *many)), *(_cell(row, name) for name in COLUMNS)]
        for _, row in table.iterrows()
    ]
    return [*words, *many, *(heading for _, heading in COLUMNS.values())], rows


def _cell(row: Any, name: str) -> str:
    key = COLUMNS[name][0]
    return Mean(row[name] / scale_of(key), row[f"{name}_half"] / scale_of(key), row[f"{name}_n"]).text(
        key, row["seeds"]
    )


def latex(table: pd.DataFrame) -> str:
    """The table for a paper, with the rules of booktabs."""
    headings, rows = cells(table)
    return latex_table(headings, rows, len(COLUMNS) + ("seeds" in headings))
