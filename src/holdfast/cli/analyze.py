"""holdfast analyze."""

from __future__ import annotations

from typing import Annotated

import typer

from holdfast.cli.console import RUNS, answer_for, print_table
from holdfast.cli.train import RunsOption


def analyze(
    run: Annotated[str, typer.Argument(help="A run (its folder or name), or a data set.")],
    analysis: Annotated[str, typer.Argument(help="What to measure; holdfast list analyses names them.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="threat=..., data.KEY=..., and KEY=... for settings of the analysis.")
    ] = None,
    beside: Annotated[
        list[str] | None, typer.Option("--with", help="Another run to show beside it; may be repeated.")
    ] = None,
    checkpoints: Annotated[
        str | None, typer.Option(help="all: also the weights that training.keep_every left; of neural-collapse.")
    ] = None,
    runs: RunsOption = RUNS,
) -> None:
    """Explain a trained model or a data set: numbers, tables and figures in a folder below the run's.

    The last line of the output is the folder's path.
    """
    with answer_for() as progress:
        import yaml
        from pydantic import ValidationError

        from holdfast.component import explain
        from holdfast.experiments import analyze
        from holdfast.experiments.analyses import Analysis

        own: dict[str, object] = {"name": analysis, **({"checkpoints": checkpoints} if checkpoints else {})}
        rest = []
        for override in overrides or ():
            key, separator, value = override.partition("=")
            if not separator:
                raise ValueError(f"expected key=value, given {override!r}")
            if key.split(".")[0] in ("threat", "data"):
                rest.append(override)
            else:
                own[key] = yaml.safe_load(value)
        try:
            chosen = Analysis.parse(own)
        except ValidationError as fault:
            raise ValueError(explain(fault)) from fault
        findings, folder = analyze(run, chosen, *rest, beside=beside or (), runs=runs, reporter=progress)
        print_table(analysis, ["", ""], findings.summary)
        print(folder)
