"""holdfast export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from holdfast.cli.console import RUNS, answer_for
from holdfast.cli.train import RunsOption


def export(
    run: Annotated[str, typer.Argument(help="A run: its folder or its name.")],
    folder: Annotated[Path, typer.Argument(help="Where to write.")],
    threat: Annotated[str | None, typer.Option(help="Another threat model, such as linf:8/255.")] = None,
    examples: Annotated[int, typer.Option(min=1, help="At most so many test images.")] = 10,
    runs: RunsOption = RUNS,
) -> None:
    """Write what a run leaves undecided as ONNX and VNN-LIB files for a complete verifier.

    Under the run's own threat model these are test images that no attack broke and no certifier verified;
    under another one, those that the model gets right. The last line of the output is the list of problems.
    """
    with answer_for() as progress:
        from holdfast.experiments import export_run

        path, count = export_run(run, folder, threat=threat, examples=examples, runs=runs)
        progress.stage(f"{count} problems")
        print(path)
