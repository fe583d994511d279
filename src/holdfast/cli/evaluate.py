"""holdfast evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from holdfast.cli.console import RUNS, answer_for, print_run
from holdfast.cli.train import RunsOption

NAMES = "Names separated by commas, in place of the recipe's; settings go in as evaluation.{}=[{{name: ...}}]."


def evaluate(
    model: Annotated[
        str, typer.Argument(help="A run (its folder or name), a file of weights, or package.module:factory.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="threat=..., evaluation.KEY=..., data.KEY=... or model.KEY=...")
    ] = None,
    threat: Annotated[str | None, typer.Option(help="Another threat model, such as linf:8/255.")] = None,
    attacks: Annotated[str | None, typer.Option(help=NAMES.format("attacks"))] = None,
    certifiers: Annotated[str | None, typer.Option(help=NAMES.format("certifiers"))] = None,
    data: Annotated[str | None, typer.Option(help="Data set, for weights or a factory.")] = None,
    architecture: Annotated[str | None, typer.Option(help="Model that the weights belong to.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Evaluate weights or a factory anew.")] = False,
    runs: RunsOption = RUNS,
) -> None:
    """Attack and certify a model: a run's, or any other.

    The result gets a folder of its own, below the run's where there is one; the last line of the output is
    its path. An evaluation that was cut off goes on where it stopped.
    """
    chosen = list(overrides or [])
    chosen += [f"threat={threat}"] if threat else []
    chosen += [f"evaluation.attacks=[{attacks}]"] if attacks is not None else []
    chosen += [f"evaluation.certifiers=[{certifiers}]"] if certifiers is not None else []
    with answer_for() as progress:
        from holdfast.experiments import evaluate_model, evaluate_run

        weights = Path(model).is_file()
        if architecture and not weights:
            raise FileNotFoundError(f"there is no file {model}")
        if weights or ":" in model:
            if not data or not threat or (weights and not architecture):
                needed = "--data, --threat and --architecture" if weights else "--data and --threat"
                raise ValueError(f"{model} is no run: say {needed}")
            network: dict[str, Any] = {"name": architecture, "weights": model} if weights else {"name": model}
            recipe = {"data": {"name": data}, "model": network, "threat": threat, "evaluation": {}}
            if certifiers is None:
                recipe["evaluation"] = {"certifiers": []}
            print_run(evaluate_model(recipe, *chosen, runs=runs, again=again, reporter=progress))
        else:
            print_run(evaluate_run(model, *chosen, runs=runs, reporter=progress))
