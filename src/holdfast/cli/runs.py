"""holdfast runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.cli.console import RUNS, answer_for, percent, print_table
from holdfast.cli.train import RunsOption

if TYPE_CHECKING:
    from holdfast.experiments.records.record import Record

SHOWN = {
    "data": "data",
    "model": "model",
    "objective": "loss",
    "threat": "threat",
    "standard": "std",
    "attacked": "attacked",
    "certified": "certified",
}
ACCURACIES = ("standard", "attacked", "certified")
OfOption = Annotated[str, typer.Option("--of", help="trainings (with their latest evaluation) or evaluations.")]
WhereOption = Annotated[
    str, typer.Option(help="Conditions, all to be met: 'objective=trades data.train_size>=1000 threat.eps=8/255'.")
]


def runs(
    where: WhereOption = "",
    sort: Annotated[str, typer.Option(help="A name to sort by, -NAME for the largest first; oldest first.")] = "",
    columns: Annotated[str, typer.Option(help="Names of settings and results to show, separated by commas.")] = "",
    export: Annotated[
        Path | None, typer.Option(help="Write all names (or --columns) to this .csv, .parquet or .tex file.")
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete the runs listed, once confirmed.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Confirmed.")] = False,
    of: OfOption = "trainings",
    runs: RunsOption = RUNS,
) -> None:
    """List the runs of a folder, select and sort them by any setting or result, export or delete them.

    A training stands with the numbers of its latest evaluation; --of evaluations lists every one.
    """
    with answer_for() as progress:
        from holdfast.experiments.records import record as store
        from holdfast.experiments.records import selection

        found = store.read_records(runs, of)
        chosen = selection.select(found, where) if where else found
        chosen = selection.order(chosen, sort) if sort else chosen
        keys = [key.strip() for key in columns.split(",")] if columns else list(SHOWN)
        shown = {one.values.get("evaluation.data.name") for one in chosen} - {None}
        if shown and not columns:  # not on the data that was trained on
            keys.insert(1, "evaluation.data")
        if not columns and any("note" in one.values for one in chosen):
            keys.append("note")
        if columns:
            selection.check_keys(found, keys)
        headings = ["run", "", *(SHOWN.get(key, key) for key in keys)]
        count = (
            f"{len(chosen)} runs in {runs}" if len(chosen) == len(found) else f"{len(chosen)} of {len(found)} runs"
        )
        print_table(count, headings, [_row(record, keys) for record in chosen])
        if export:
            _export(chosen, keys if columns else sorted(selection.known_keys(chosen)), export)
            progress.stage(f"{len(chosen)} runs in {export}")
        if delete:
            _delete(chosen, runs, yes)


def _row(record: Record, keys: Sequence[str]) -> list[str]:
    if record.status == "damaged":
        return [record.name, "damaged", record.values["fault"], *[""] * (len(keys) - 1)]
    state = "" if record.status == "finished" else record.status
    return [record.name, state, *(_cell(key, record.values.get(key)) for key in keys)]


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "–"
    if key in ACCURACIES:
        return percent(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _export(records: Sequence[Record], keys: Sequence[str], path: Path) -> None:
    from holdfast.experiments.records import selection
    from holdfast.files import whole_file, write_text

    lines = list(selection.rows(records, keys))
    if path.suffix == ".tex":
        write_text(
            path, selection.latex(["run", *keys], [["–" if v is None else str(v) for v in row] for row in lines], 0)
        )
        return
    if path.suffix not in (".csv", ".parquet"):
        raise ValueError(f"expected a .csv, .parquet or .tex file, given {path}")
    import pandas as pd

    table = pd.DataFrame(lines, columns=["run", *keys])
    if path.suffix == ".csv":
        write_text(path, table.to_csv(index=False))
        return
    for name, column in table.items():  # parquet has one type for a column
        if len({type(value) for value in column if value is not None} - {int, float}) > 0:
            table[name] = [None if value is None else str(value) for value in column]
    with whole_file(path) as temporary:
        table.to_parquet(temporary)


def _delete(records: Sequence[Record], runs: Path, confirmed: bool) -> None:
    from holdfast.files import remove

    folders = [record.path for record in records if record.status != "old"]
    if not folders:
        raise ValueError("there is nothing to delete")
    if not confirmed and not typer.confirm(f"delete these {len(folders)} runs with all their files?", err=True):
        typer.echo("nothing was deleted", err=True)
        return
    for folder in folders:
        remove(folder)
    typer.echo(f"{len(folders)} runs were deleted from {runs}", err=True)
