"""An evaluation of a run, whose time may be up before all is asked."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from helpers import TINY

from holdfast import train
from holdfast.evaluation import stages

RADII = (
    "evaluation.certifiers=[{name: bounds, method: crown}]",
    "evaluation.radii=[0.05]",
    "evaluation.curve_points=0",
    "evaluation.audit=0",
)


def test_radii_are_asked_where_the_time_was_enough_and_are_open_where_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train("digits", *TINY, *RADII, runs=tmp_path / "whole").result
    in_time = train("digits", *TINY, *RADII, "evaluation.minutes=10", runs=tmp_path / "in-time").result
    assert in_time["certified_at"] == whole["certified_at"]
    assert 0 < whole["certified_at"]["bounds"]["linf:0.05"] < 1
    ticks = itertools.count()
    monkeypatch.setattr(stages.time, "monotonic", lambda: next(ticks))
    late = train("digits", *TINY, *RADII, "evaluation.minutes=0.05", runs=tmp_path / "late").result
    assert late["certified"] == whole["certified"]
    assert set(late["not_reached"]) == {"pgd"}
    assert late["certified_at"]["bounds"] == {"linf:0.05": None, "mean radius": None}
