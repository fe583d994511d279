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
        from holdfast.experiments.runs.folder import all_evaluations, all_runs, find_run
        from holdfast.foreign import no_imports

        chosen = (
            [find_run(name, runs) for name in names]
            if names
            else all_evaluations(runs)
            if of == "evaluations"
            else all_runs(runs)
        )
        readable = []
        for run in chosen:
            try:
                with no_imports():  # looking at a folder runs no code that it names
                    if run.finished and run.result and run.experiment:
                        readable.append(run)
            except ValueError as fault:  # one damaged run does not hide the others
                progress.stage(f"left out: {fault}")
        found = defence_table(readable)
        if not len(found):
            raise ValueError(f"there are no finished trainings {'among these' if names else f'in {runs}'}")
        if form is Form.CSV:
            print(found.to_csv(index=False), end="")
        elif form is Form.LATEX:
            print(latex(found))
        else:
            print_table(f"{len(found)} defences", *cells(found))
