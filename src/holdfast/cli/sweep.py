"""holdfast sweep."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from holdfast.cli.console import ALARM, FAILED, RUNS, ProgressLine, answer_for, print_table
from holdfast.cli.train import RecipeArgument, RunsOption

if TYPE_CHECKING:
    from holdfast.experiments.sweeps.launchers import Launcher
    from holdfast.experiments.sweeps.sweep import Outcome, Planned

WorkersOption = Annotated[int, typer.Option(min=0, help="Runs at once; 0 works in this process.")]
OnOption = Annotated[str, typer.Option("--on", help="pool (processes here), slurm, local (submitit, here) or ray.")]
AddressOption = Annotated[
    str | None, typer.Option(help="Of the Ray cluster; a new one on this machine by default.")
]
ResourceOption = Annotated[
    list[str] | None,
    typer.Option("--resource", help="KEY=VALUE for Slurm (timeout_min, gpus_per_node) or Ray (num_gpus=0.25)."),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show the plan and its cost, and do nothing.")]


def sweep(
    recipe: RecipeArgument,
    axes: Annotated[
        list[str] | None,
        typer.Argument(
            help="KEY=A,B,C; KEY=range(16,1024,*2); KEY=uniform(0,1); KEY=loguniform(1e-3,10); "
            "KEY=of(60000 / data.train_size); KEY+OTHER=[1,2],[3,4]."
        ),
    ] = None,
    trials: Annotated[int, typer.Option(min=0, help="Draws of the random keys.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each, counted from the recipe's.")] = 1,
    workers: WorkersOption = 1,
    on: OnOption = "pool",
    address: AddressOption = None,
    resource: ResourceOption = None,
    dry_run: DryRunOption = False,
    runs: RunsOption = RUNS,
) -> None:
    """Train every combination of values, on one machine or many; finished runs are not repeated.

    One failed run stops no other. A sweep that was cut off goes on with the same command. The last line of the
    output is the folder of runs.
    """
    with answer_for() as progress:
        from holdfast.experiments.sweeps.axes import parse_axis
        from holdfast.experiments.sweeps.sweep import plan

        planned = plan(recipe, [parse_axis(axis) for axis in axes or ()], trials=trials, seeds=seeds)
        if dry_run:
            show_plan(planned, workers)
            return
        chosen = make_launcher(on, workers, address, resource, runs)
        outcomes = carry_out(planned, chosen, runs, progress, workers)
        keys = list(dict.fromkeys(key for one in planned for key in one.labels))
        rows = [
            [one.planned.identity, *(one.planned.labels.get(key, "–") for key in keys), one.status, _last(one.text)]
            for one in outcomes
        ]
        print_table(f"{len(outcomes)} runs", ["run", *keys, "", ""], rows)
        print(runs)
    leave_with(outcomes)


def _last(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else ""


def make_launcher(
    on: str, workers: int, address: str | None, resource: Sequence[str] | None, runs: Path
) -> Launcher:
    """The launcher that the options name."""
    import yaml

    from holdfast.experiments.sweeps.launchers import launcher

    resources = {}
    for text in resource or ():
        key, separator, value = text.partition("=")
        if not separator:
            raise ValueError(f"expected --resource KEY=VALUE, given {text!r}")
        resources[key] = yaml.safe_load(value)
    return launcher(on, workers, folder=runs / ".jobs", address=address, resources=resources)


def show_plan(plan: Sequence[Planned], workers: int) -> None:
    """What would be run, and about how long its training takes."""
    keys = list(dict.fromkeys(key for one in plan for key in one.labels))
    print_table(
        f"{len(plan)} runs",
        ["run", *keys],
        [[one.identity, *(one.labels.get(key, "–") for key in keys)] for one in plan],
    )
    print(cost_line(plan, workers))


def cost_line(plan: Sequence[Planned], workers: int) -> str:
    """About how long the training of a plan takes; the reason where that cannot be known."""
    from holdfast.experiments.sweeps.cost import estimate

    try:
        cost = estimate(plan, workers=max(1, workers))
    except Exception as fault:  # a model that cannot work fails its own run, later
        return f"{len(plan)} runs; their cost cannot be estimated here: {fault}"
    each = f" each for {workers} workers" if workers > 1 else ""
    return (
        f"{cost.runs} runs, {cost.batches} batches: about {_duration(cost.seconds / max(1, workers))} of training"
        f"{each} on this machine, evaluation not counted"
    )


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def carry_out(
    plan: Sequence[Planned], launcher: Launcher, runs: Path, progress: ProgressLine, workers: int
) -> list[Outcome]:
    """The sweep under one display."""
    from holdfast.experiments.sweeps.sweep import sweep

    progress.begin_many(runs)
    with _display(progress, workers) as display:
        return sweep(plan, launcher, runs=runs, watcher=display)


def leave_with(outcomes: Sequence[Outcome]) -> None:
    """The exit code of a sweep: an alarm is louder than a failure."""
    states = {one.status for one in outcomes}
    if states - {"finished"}:
        raise typer.Exit(ALARM if "alarm" in states else FAILED)


@contextlib.contextmanager
def _display(line: ProgressLine, workers: int) -> Iterator[Any]:
    from holdfast.experiments.sweeps.sweep import Watcher

    class Display(Watcher):
        """A bar for the sweep and one for each run under way; a line for each that ended."""

        def __init__(self) -> None:
            self.bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(16),
                TimeElapsedColumn(),
                TextColumn("{task.fields[text]}"),
                console=line.console,
                transient=True,
                disable=not line.console.is_terminal,
            )
            self.tasks: dict[str, Any] = {}
            self.count = self.ended = 0

        def begin(self, plan: Sequence[Planned], left: Sequence[Planned]) -> None:
            self.count, self.ended = len(plan), len(plan) - len(left)
            before = f", {self.ended} of them finished before" if self.ended else ""
            self.say(f"{len(plan)} runs{before}")
            if left:
                self.say(cost_line(left, workers))
            self.all = self.bars.add_task("all", total=len(plan), completed=self.ended, text="")

        def look(self, underway: Mapping[str, dict[str, Any]]) -> None:
            for identity, said in underway.items():
                if identity not in self.tasks:
                    self.tasks[identity] = self.bars.add_task(identity, text="")
                self.bars.update(
                    self.tasks[identity], completed=said["done"], total=said["total"], text=said["text"]
                )

        def end(self, outcome: Outcome) -> None:
            self.ended += 1
            self.bars.update(self.all, completed=self.ended)
            identity = outcome.planned.identity
            if identity in self.tasks:
                self.bars.remove_task(self.tasks.pop(identity))
            words = ", ".join(f"{key}={value}" for key, value in outcome.planned.labels.items())
            self.say(
                f"{self.ended}/{self.count} {identity} {outcome.status} ({outcome.seconds:.0f} s) {words}: "
                f"{outcome.text}"
            )

        def say(self, text: str) -> None:
            line.console.print(text, highlight=False, soft_wrap=True, markup=False)

    display = Display()
    with display.bars:
        yield display
