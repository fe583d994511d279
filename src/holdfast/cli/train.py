"""holdfast train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from holdfast.cli.console import RUNS, answer_for, print_run

RecipeArgument = Annotated[str, typer.Argument(help="A recipe's name, or the path of a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key=value on top of the recipe, such as objective.kappa=0.3 or objective=trades."),
]
RunsOption = Annotated[Path, typer.Option(envvar="HOLDFAST_RUNS", help="The folder of runs.")]


def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    runs: RunsOption = RUNS,
    again: Annotated[bool, typer.Option("--again", help="Throw away what is there and start anew.")] = False,
    track: Annotated[str | None, typer.Option(help="Trackers, separated by commas: tensorboard, wandb.")] = None,
) -> None:
    """Train a recipe, evaluate it, and print standard, attacked and certified accuracy.

    What is trained is not trained again: other attacks, certifiers or images make another evaluation of it. What
    was cut off goes on where it stopped. The last line of the output is the path of the training's folder.
    """
    with answer_for() as progress:
        from holdfast.experiments import train

        run = train(
            recipe,
            *(overrides or []),
            runs=runs,
            again=again,
            reporter=progress,
            track=[name.strip() for name in track.split(",")] if track else (),
        )
        progress.close()
        if run.experiment.engine.leads:
            print_run(run)
