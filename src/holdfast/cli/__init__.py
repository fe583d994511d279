"""The command line: one small file per command. Nothing here imports torch before a command runs."""

from __future__ import annotations

import io
import logging
import sys
from typing import Annotated

import typer

from holdfast import __version__
from holdfast.cli.analyze import analyze
from holdfast.cli.audit import audit
from holdfast.cli.evaluate import evaluate
from holdfast.cli.export import export
from holdfast.cli.list import list_
from holdfast.cli.plot import plot
from holdfast.cli.runs import runs
from holdfast.cli.show import show
from holdfast.cli.study import study
from holdfast.cli.sweep import sweep
from holdfast.cli.table import table
from holdfast.cli.train import train
from holdfast.cli.verify import verify

app = typer.Typer(
    name="holdfast",
    help="Train, attack, certify and understand classifiers that hold fast under perturbation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _say_version(asked: bool) -> None:
    if asked:
        print(f"holdfast {__version__}")
        raise typer.Exit


VersionOption = Annotated[
    bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say which version this is.")
]


@app.callback()
def _options(version: VersionOption = False) -> None:
    pass


for command in (train, sweep, study, evaluate, verify, audit, analyze, export, show, runs, table):
    app.command()(command)
app.command("list")(list_)
app.add_typer(plot, name="plot")


def main() -> None:
    """The ``holdfast`` program.

    A terminal or a pipe that cannot show a character gets a question mark: no run fails for the sake of a dash.
    Nor is anybody told at length that matplotlib makes do with a temporary folder where there is no home.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app()
