"""holdfast list."""

from __future__ import annotations

from typing import Annotated

import typer

from holdfast.cli.console import answer_for, print_table

FAMILIES = (
    "recipes",
    "studies",
    "data",
    "augmentations",
    "models",
    "objectives",
    "attacks",
    "certifiers",
    "optimizers",
    "schedules",
    "analyses",
)


def list_(
    family: Annotated[str | None, typer.Argument(help=f"One of {', '.join(FAMILIES)}; all by default.")] = None,
) -> None:
    """List recipes and components by name, with a sentence on each."""
    with answer_for():
        from holdfast.component import nearest
        from holdfast.experiments.catalogue import catalogue

        entries = catalogue()
        if family is not None and family not in entries:
            raise ValueError(f"{family!r} is not one of the families; {nearest(family, entries)}")
        for name in [family] if family else entries:
            print_table(name, ["name", "what it is"], list(entries[name].items()))
