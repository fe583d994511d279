"""holdfast study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.cli.console import RUNS, answer_for, print_table
from holdfast.cli.sweep import (
    AddressOption,
    DryRunOption,
    OnOption,
    ResourceOption,
    WorkersOption,
    carry_out,
    leave_with,
    make_launcher,
    show_plan,
)
from holdfast.cli.train import Overrides, RunsOption

if TYPE_CHECKING:
    from holdfast.experiments.studies.claims import Answered


def print_claims(claims: Sequence[Answered], *, smoke: bool) -> None:
    """Each with its answer, or that a smoke test answers none."""
    if claims and smoke:
        print(f"a smoke test: {len(claims)} claims are answered at --scale 1")
        return
    for one in claims:
        print(f"{one.answer}: {one.claim.says}")
        print(f"    {one.claim.condition}: {one.interval}{f'; {one.why}' if one.why else ''}")


def study(
    name: Annotated[str, typer.Argument(help="A study (holdfast list studies names them), or a YAML file.")],
    overrides: Overrides = None,
    data: Annotated[
        str | None, typer.Option(help="digits: on the embedded digits, with settings for them.")
    ] = None,
    scale: Annotated[
        float, typer.Option(help="Share of the images shown, test images and seeds, such as 0.01.")
    ] = 1.0,
    workers: WorkersOption = 1,
    on: OnOption = "pool",
    address: AddressOption = None,
    resource: ResourceOption = None,
    dry_run: DryRunOption = False,
    runs: RunsOption = RUNS,
) -> None:
    """Repeat a published experiment at the scale of the machine at hand, the published numbers beside ours.

    Runs that are finished are not repeated. The last line of the output is the folder of the table and figures.
    """
    outcomes = []
    with answer_for() as progress:
        from holdfast.experiments.studies.report import report_separation, report_staircase, report_study
        from holdfast.experiments.studies.study import plan_study, read_study
        from holdfast.inference import fingerprint

        chosen = read_study(name)
        if data not in (None, "digits"):
            raise ValueError(f"a study runs on its own data or on digits, given --data {data}")
        digits = data == "digits"
        planned, notes = plan_study(chosen, digits=digits, scale=scale, overrides=overrides or ())
        if overrides and not planned:
            raise ValueError(f"{overrides[0]!r} has no effect: {name} trains nothing")
        progress.stage(f"{chosen.title} ({chosen.source})")
        for note in notes:
            progress.stage(f"scale {scale:g}: {note}")
        parts = [name.replace("/", "_"), *(["digits"] if digits else []), *([] if scale == 1 else [f"{scale:g}"])]
        if overrides:
            progress.stage(f"with {' '.join(overrides)}, so the published numbers are of other settings")
            parts.append(fingerprint(*overrides)[:6])
        folder = runs / "studies" / "-".join(parts)
        if dry_run:
            if planned:
                show_plan(planned, workers)
            return
        if chosen.separation:
            report = report_separation(chosen, folder, runs, digits=digits, scale=scale, reporter=progress)
        elif chosen.staircase:
            report = report_staircase(chosen, folder, scale=scale, reporter=progress)
        else:
            launcher = make_launcher(on, workers, address, resource, runs)
            outcomes = carry_out(planned, launcher, runs, progress, workers)
            finished = [one.planned for one in outcomes if one.status == "finished"]
            if not finished:
                leave_with(outcomes)
            missing = [one.planned for one in outcomes if one.status != "finished"]
            report = report_study(chosen, finished, runs, folder, digits=digits, missing=missing)
        print_table(chosen.title, report.headings, report.rows)
        for one in () if digits and not chosen.staircase else chosen.published:
            print(f"{'published' if one.verified else 'unverified'}: {one.source}")
        print_claims(report.claims, smoke=digits and scale < 1)
        for figure in report.figures:
            print(figure)
        print(report.folder)
    leave_with(outcomes)
