"""holdfast runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.cli.console import RUNS, answer_for, percent, print_table
from holdfast.cli.train import RunsOption

if TYPE_CHECKING:
    from holdfast.experiments import Run


def runs(runs: RunsOption = RUNS) -> None:
    """List the runs of a folder with their accuracies."""
    with answer_for():
        from holdfast.experiments.folder import all_runs

        rows = []
        for run in all_runs(runs):
            try:
                rows.append(_row(run))
            except ValueError as fault:  # one damaged run does not hide the others
                rows.append((run.path.name, "damaged", str(fault), *[""] * 5))
        columns = ["run", "data", "model", "loss", "threat", "std", "attacked", "certified"]
        print_table(f"{len(rows)} runs in {runs}", columns, rows)


def _row(run: Run) -> tuple[str, ...]:
    recipe = run.experiment
    loss = recipe.objective.name if recipe.objective else "–"
    parts = (recipe.data.name, recipe.model.name, loss, str(recipe.threat))
    if not run.finished:
        return (run.path.name, *parts, "–", "–", "–")
    result = run.result
    accuracies = result["standard"], result["bracket"]["attacked"], result["bracket"]["certified"]
    return (run.path.name, *parts, *map(percent, accuracies))
