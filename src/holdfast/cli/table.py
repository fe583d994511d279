"""holdfast table."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from holdfast.cli.console import RUNS, answer_for, print_table
from holdfast.cli.runs import OfOption
from holdfast.cli.train import RunsOption


class Form(StrEnum):
    TEXT, CSV, LATEX = "text", "csv", "latex"


def table(
    names: Annotated[list[str] | None, typer.Argument(help="Runs: folders or names; all finished ones.")] = None,
    form: Annotated[Form, typer.Option("--format", help="How to print it.")] = Form.TEXT,
    of: OfOption = "trainings",
    runs: RunsOption = RUNS,
) -> None:
    """Print what each defence reaches: accuracies on training and test images, local Lipschitz constant, gaps.

    Runs that differ in their seeds only make one row, with 95 % intervals. Accuracies and gaps are in per cent.
    """
    with answer_for() as progress:
        from holdfast.experiments.records.defences import cells, defence_table, latex
        from holdfast.experiments.records.find import find_folder
        from holdfast.experiments.records.record import read_record, read_records

        records = [read_record(find_folder(name, runs)) for name in names] if names else read_records(runs, of)
        for one in records:
            if one.status == "damaged":  # it does not hide the others
                progress.stage(f"left out: {one.path}: {one.values['fault']}")
        found = defence_table(records)
        if not len(found):
            raise ValueError(f"there are no finished trainings {'among these' if names else f'in {runs}'}")
        if form is Form.CSV:
            print(found.to_csv(index=False), end="")
        elif form is Form.LATEX:
            print(latex(found))
        else:
            print_table(f"{len(found)} defences", *cells(found))
