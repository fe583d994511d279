"""The old name of ``holdfast.experiments.records.defences``, whose table was of ``Run``; it goes in 0.3."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from holdfast.experiments.records import defences
from holdfast.experiments.records.defences import COLUMNS, cells, latex
from holdfast.experiments.records.record import ELSEWHERE, Record, flatten, named
from holdfast.experiments.runs.folder import Run

__all__ = ["COLUMNS", "cells", "defence_table", "latex"]


def defence_table(runs: Sequence[Run]) -> pd.DataFrame:
    """``defences.defence_table`` of the finished ones."""
    return defences.defence_table([_record(run) for run in runs if run.finished])


def _record(run: Run) -> Record:
    settings = run.experiment.model_dump(mode="json") | {"threat": str(run.experiment.test_threat)}
    recipe = flatten({key: value for key, value in settings.items() if key not in ELSEWHERE})
    return Record(run.path, "finished", named(settings, run.result), recipe)
