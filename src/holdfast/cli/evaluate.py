"""holdfast evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from holdfast.cli.console import RUNS, answer_for, print_run, print_runs
from holdfast.cli.train import RunsOption

NAMES = "Names separated by commas, in place of the recipe's; settings go in as evaluation.{}=[{{name: ...}}]."


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="A run (its folder or name), a file of weights, a network in a file (ONNX, .pt2, TorchScript), "
            "or package.module:factory."
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="threat=..., evaluation.KEY=..., data.KEY=... or model.KEY=...")
    ] = None,
    threat: Annotated[
        str | None,
        typer.Option(help="Another threat model, such as linf:8/255; or several: linf:2/255,4/255,l2:0.5."),
    ] = None,
    attacks: Annotated[str | None, typer.Option(help=NAMES.format("attacks"))] = None,
    certifiers: Annotated[str | None, typer.Option(help=NAMES.format("certifiers"))] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Bound methods separated by commas: one certifier for each, such as ibp,crown."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Data set whose test images are evaluated; a run's own by default.")
    ] = None,
    architecture: Annotated[str | None, typer.Option(help="Model that the weights belong to.")] = None,
    minutes: Annotated[
        str | None,
        typer.Option(help="Certify and attack for so long, where that decides most; asked again, it goes on."),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Evaluate anew what is finished.")] = False,
    runs: RunsOption = RUNS,
) -> None:
    """Attack and certify a model: a run's, or any other.

    The result gets a folder of its own, below the run's where there is one; the last line of the output is
    its path. An evaluation that was cut off, or whose minutes were up, goes on where it stopped; one that is
    finished is not repeated where
    another curve, or more adversarial images to keep, is all that is asked.
    """
    chosen = list(overrides or [])
    chosen += [f"evaluation.attacks=[{attacks}]"] if attacks is not None else []
    chosen += [f"evaluation.certifiers=[{certifiers}]"] if certifiers is not None else []
    if methods is not None:
        listed = ", ".join(f"{{name: bounds, method: {method}}}" for method in methods.split(","))
        chosen.append(f"evaluation.certifiers=[{listed}]")
    chosen += [f"evaluation.minutes={minutes}"] if minutes is not None else []
    threats = several(threat)
    with answer_for() as progress:
        from holdfast import Threat
        from holdfast.experiments import evaluate_model, evaluate_run

        for one in threats:
            Threat.parse(one)  # all of them, before the first is evaluated
        network = foreign_model(model, architecture)
        done = []
        for one in threats or [""]:
            if network:
                if not data or not one or not network["name"]:
                    needed = "--data and --threat" if network["name"] else "--data, --threat and --architecture"
                    raise ValueError(f"{model} is no run: say {needed}")
                recipe = {"data": {"name": data}, "model": network, "threat": one, "evaluation": {}}
                if certifiers is None:
                    recipe["evaluation"] = {"certifiers": []}
                done.append(evaluate_model(recipe, *chosen, runs=runs, again=again, reporter=progress))
            else:
                here = [*([f"threat={one}"] if one else []), *([f"data={data}"] if data else [])]
                done.append(evaluate_run(model, *chosen, *here, runs=runs, again=again, reporter=progress))
        print_run(done[0]) if len(done) == 1 else print_runs(done)


def foreign_model(model: str, architecture: str | None) -> dict[str, Any] | None:
    """The settings of a model that nobody trained here; None for a run.

    Raises:
        FileNotFoundError: an architecture for a file that is not there.
        ValueError: a file of another kind, or an architecture for a file that needs none.
    """
    from holdfast.models.weights import NETWORKS, network_in

    file = Path(model)
    if architecture and not file.is_file():
        raise FileNotFoundError(f"there is no file {model}")
    if file.is_file() and (name := network_in(file)):
        if architecture:
            raise ValueError(f"{model} is {NETWORKS[name]} with layers of its own: leave --architecture out")
        return {"name": name, "path": model}
    if file.is_file():
        return {"name": architecture, "weights": model}
    return {"name": model} if ":" in model else None


def several(threats: str | None) -> list[str]:
    """``linf:0.1,0.2,l2:1`` as three threats: a radius alone takes the norm before it."""
    result: list[str] = []
    for part in threats.split(",") if threats else ():
        norm = result[-1].partition(":")[0] + ":" if ":" not in part and result else ""
        result.append(norm + part.strip())
    return result
