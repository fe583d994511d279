"""holdfast plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.cli.console import RUNS, ProgressLine, answer_for, print_table
from holdfast.cli.runs import OfOption, WhereOption
from holdfast.cli.train import RunsOption

if TYPE_CHECKING:
    import pandas as pd

    from holdfast.experiments.records.record import Record

plot = typer.Typer(
    help="Draw finished runs: PNG, PDF, SVG, and the numbers as CSV. Settings and results go by dotted names.",
    no_args_is_help=True,
)
XOption = Annotated[str, typer.Option("--x", help="What goes to the right, such as data.train_size.")]
YOption = Annotated[str, typer.Option("--y", help="What is drawn; several separated by commas.")]
ByOption = Annotated[str, typer.Option("--by", help="What tells runs apart; several separated by commas.")]
BestOption = Annotated[
    str,
    typer.Option(
        help="Where settings differ, take the best by this name (-NAME: smallest): last.validation_certified."
    ),
]
OutputOption = Annotated[Path | None, typer.Option("--output", "-o", help="Path of the figure, without suffix.")]
LogXOption = Annotated[bool, typer.Option("--log-x", help="Logarithmic x axis.")]
LogYOption = Annotated[bool, typer.Option("--log-y", help="Logarithmic y axis.")]


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _chosen(runs: Path, where: str, of: str) -> list[Record]:
    from holdfast.experiments.records import record as store
    from holdfast.experiments.records import selection

    found = store.read_records(runs, of)
    return selection.select(found, where) if where else found


def _compared(
    progress: ProgressLine,
    runs: Path,
    where: str,
    of: str,
    y: str,
    by: Sequence[str],
    best: str,
    *,
    numeric: bool = False,
) -> tuple[pd.DataFrame, list[str]]:
    from holdfast.experiments.records.comparison import compare

    records = _chosen(runs, where, of)
    table = compare(records, y=_names(y), by=by, best=best or None)
    left = sum(one.status not in ("finished", "old") for one in records)
    if left:
        progress.stage(f"{left} runs are not finished and left out")
    for key in by[:1] if numeric else ():
        empty = int((table[key].astype(str) == "none").sum())
        if empty:
            progress.stage(f"{empty} points are left out: {key} is empty there")
            table = table[table[key].astype(str) != "none"]
            table = table.assign(**{key: table[key].infer_objects()})
    if not len(table):
        raise ValueError(f"no finished run has all of {', '.join([*_names(y), *by])}")
    return table, _names(y)


def _save(
    figure: Any, table: pd.DataFrame, output: Path | None, runs: Path, kind: str, names: Sequence[str]
) -> None:
    from holdfast.plots import save_figure

    stem = output or runs / "figures" / "-".join([kind, *(name.replace(".", "_") for name in names)])
    stem = stem.with_suffix("") if stem.suffix in (".png", ".pdf", ".svg", ".csv") else stem
    save_figure(figure, stem, table)
    print(f"{stem}.png")


@plot.command()
def lines(
    x: XOption,
    y: YOption = "certified",
    by: ByOption = "",
    where: WhereOption = "",
    best: BestOption = "",
    log_x: LogXOption = False,
    log_y: LogYOption = False,
    output: OutputOption = None,
    of: OfOption = "trainings",
    runs: RunsOption = RUNS,
) -> None:
    """Means over seeds against a setting, with 95 % bands."""
    with answer_for() as progress:
        from holdfast.plots.results import lines_figure

        groups = _names(by)
        table, names = _compared(progress, runs, where, of, y, [x, *groups], best, numeric=True)
        figure = lines_figure(table, x, names, groups, log_x=log_x, log_y=log_y)
        _save(figure, table, output, runs, "lines", [*names, x])


@plot.command()
def scatter(
    x: XOption,
    y: YOption = "certified",
    by: ByOption = "",
    where: WhereOption = "",
    log_x: LogXOption = False,
    log_y: LogYOption = False,
    output: OutputOption = None,
    of: OfOption = "trainings",
    runs: RunsOption = RUNS,
) -> None:
    """A point for every run."""
    with answer_for() as progress:
        from holdfast.experiments.records import selection
        from holdfast.plots.results import scatter_figure

        names, groups = _names(y), _names(by)
        records = [one for one in _chosen(runs, where, of) if one.status in ("finished", "old")]
        selection.check_keys(records, [x, *names, *groups])
        rows = [row for row in selection.rows(records, [x, *names, *groups]) if None not in row[1 : 2 + len(names)]]
        if not rows:
            raise ValueError(f"no finished run has {x} and {y}")
        import pandas as pd

        table = pd.DataFrame(rows, columns=["run", x, *names, *groups])
        table = table.assign(**{f"{name}_half": float("nan") for name in names})
        progress.stage(f"{len(table)} runs")
        figure = scatter_figure(table, x, names, groups, log_x=log_x, log_y=log_y)
        _save(figure, table, output, runs, "scatter", [*names, x])


@plot.command()
def bars(
    x: XOption,
    y: YOption = "certified",
    by: ByOption = "",
    where: WhereOption = "",
    best: BestOption = "",
    output: OutputOption = None,
    of: OfOption = "trainings",
    runs: RunsOption = RUNS,
) -> None:
    """Groups of bars with 95 % intervals over seeds."""
    with answer_for() as progress:
        from holdfast.plots.results import bars_figure

        groups = _names(by)
        table, names = _compared(progress, runs, where, of, y, [x, *groups], best)
        _save(bars_figure(table, x, names, groups), table, output, runs, "bars", [*names, x])


@plot.command()
def curve(
    names: Annotated[list[str] | None, typer.Argument(help="Runs: folders or names; all finished ones.")] = None,
    by: ByOption = "objective",
    where: WhereOption = "",
    output: OutputOption = None,
    of: OfOption = "trainings",
    runs: RunsOption = RUNS,
) -> None:
    """Certified and attacked accuracy against the radius, several runs over one another."""
    with answer_for():
        from holdfast.experiments.records import selection
        from holdfast.experiments.records.comparison import read_curves
        from holdfast.plots.results import curves_figure

        records = [one for one in _chosen(runs, where, of) if one.status == "finished"]
        if names:
            records = [_named(records, name) for name in names]
        groups = _names(by)
        selection.check_keys(records, groups)
        curves = read_curves(records, groups)
        import pandas as pd

        table = pd.concat([one.assign(run=label) for label, one in curves.items()], ignore_index=True)
        _save(curves_figure(curves), table, output, runs, "curve", groups)


def _named(records: Sequence[Record], name: str) -> Record:
    from holdfast.component import nearest

    found = [one for one in records if one.name.startswith(Path(name).name)]
    if len(found) != 1:
        known = [one.name for one in records]
        many = f"{len(found)} finished runs begin with {name!r}" if found else f"{name!r} is not a finished run"
        raise FileNotFoundError(f"{many}; {nearest(name, known)}")
    return found[0]


@plot.command("table")
def table_(
    by: ByOption,
    y: YOption = "standard,attacked,certified",
    where: WhereOption = "",
    best: BestOption = "",
    output: OutputOption = None,
    of: OfOption = "trainings",
    runs: RunsOption = RUNS,
) -> None:
    """Means over seeds with 95 % intervals; --output writes .csv and .tex."""
    with answer_for() as progress:
        from holdfast.experiments.records.selection import latex
        from holdfast.files import write_text
        from holdfast.numbers import Mean

        groups = _names(by)
        table, names = _compared(progress, runs, where, of, y, groups, best)
        headings = [*groups, "seeds", *names]
        rows = [
            [
                *(str(row[key]) for key in (*groups, "seeds")),
                *(Mean(*row[[name, f"{name}_half", f"{name}_n"]]).text(name, row["seeds"]) for name in names),
            ]
            for _, row in table.iterrows()
        ]
        print_table(f"{len(rows)} rows", headings, rows)
        if output:
            stem = output.with_suffix("") if output.suffix in (".csv", ".tex") else output
            write_text(stem.with_suffix(".csv"), table.to_csv(index=False))
            write_text(stem.with_suffix(".tex"), latex(headings, rows, 1 + len(names)))
            print(stem.with_suffix(".csv"))
