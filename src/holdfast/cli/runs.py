"""holdfast runs."""

from __future__ import annotations

from holdfast.cli.console import RUNS, answer_for, percent, print_table
from holdfast.cli.train import RunsOption


def runs(runs: RunsOption = RUNS) -> None:
    """List the runs of a folder with their accuracies."""
    with answer_for():
        from holdfast.experiments.folder import all_runs

        rows = []
        for run in all_runs(runs):
            recipe = run.experiment
            accuracies: tuple[str, ...] = ("–", "–", "–")
            if run.finished:
                result = run.result
                bracket = result["bracket"]
                accuracies = tuple(map(percent, (result["standard"], bracket["attacked"], bracket["certified"])))
            parts = (recipe.data.name, recipe.model.name, recipe.objective.name, str(recipe.threat))
            rows.append((run.path.name, *parts, *accuracies))
        columns = ["run", "data", "model", "loss", "threat", "std", "attacked", "certified"]
        print_table(f"{len(rows)} runs in {runs}", columns, rows)
