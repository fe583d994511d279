"""holdfast evaluate."""

from __future__ import annotations

from typing import Annotated

import typer

from holdfast.cli.console import RUNS, answer_for, print_run
from holdfast.cli.train import RunsOption

NAMES = "Names separated by commas, in place of the recipe's; settings go in as evaluation.{}=[{{name: ...}}]."


def evaluate(
    run: Annotated[str, typer.Argument(help="A run's folder, or its name or the beginning of it.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="threat=... or evaluation.KEY=... on top of the run's recipe.")
    ] = None,
    threat: Annotated[str | None, typer.Option(help="Another threat model, such as linf:8/255.")] = None,
    attacks: Annotated[str | None, typer.Option(help=NAMES.format("attacks"))] = None,
    certifiers: Annotated[str | None, typer.Option(help=NAMES.format("certifiers"))] = None,
    runs: RunsOption = RUNS,
) -> None:
    """Evaluate a trained run again: another threat, other attacks or certifiers.

    The result gets a folder of its own below the run's; the last line of the output is its path.
    """
    chosen = list(overrides or [])
    chosen += [f"threat={threat}"] if threat else []
    chosen += [f"evaluation.attacks=[{attacks}]"] if attacks is not None else []
    chosen += [f"evaluation.certifiers=[{certifiers}]"] if certifiers is not None else []
    with answer_for() as progress:
        from holdfast.experiments import evaluate_run

        print_run(evaluate_run(run, *chosen, runs=runs, reporter=progress))
