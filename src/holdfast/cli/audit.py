"""holdfast audit."""

from __future__ import annotations

from typing import Annotated

import typer

from holdfast.cli.console import RUNS, answer_for, print_table
from holdfast.cli.train import RunsOption


def audit(
    run: Annotated[str, typer.Argument(help="A training, whose latest evaluation is audited, or an evaluation.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps of descent for each class and radius.")] = 100,
    restarts: Annotated[int, typer.Option(min=1, help="Starts for each class and radius.")] = 5,
    runs: RunsOption = RUNS,
) -> None:
    """Attack every certified image of an evaluation hard, at eps and at its certified radius.

    A point that contradicts a certificate rings the alarm (exit code 3) and is kept as alarm.npz beside the
    evaluation, whose path is the last line of the output.
    """
    with answer_for() as progress:
        from holdfast.experiments import audit_run

        found, audited = audit_run(run, steps=steps, restarts=restarts, runs=runs, reporter=progress)
        smallest = "–"
        if found.smallest_margin is not None:
            smallest = f"{found.smallest_margin:.4g} (example {found.example})"
        rows = [
            ("certified images audited", str(found.examples)),
            ("forward and backward passes", f"{found.passes:,}"),
            ("smallest margin found", smallest),
            ("verdict", "no contradiction"),
        ]
        print_table(f"audit in {audited.result['threat']}", ["", ""], rows)
        print(audited.path)
