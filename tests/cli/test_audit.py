"""holdfast audit: what is certified of a run, attacked hard."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY
from typer.testing import CliRunner, Result

from holdfast.cli import app

LIAR = '''
"""Radii of interval bounds, but of one image, which is certified far beyond them."""

import torch

from holdfast.certify import BoundCertifier


class Liar(BoundCertifier):
    def __call__(self, model, x, y, threat, **how):
        certificate = super().__call__(model, x, y, threat, **how)
        if len(x) > 2:  # not in the rehearsal
            last = certificate.margin.masked_fill(~certificate.verified, -torch.inf).argmax()
            certificate.radius[last] = 0.9
            certificate.margin[last] = torch.inf
        return certificate
'''


def holdfast(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def trained(runs: Path, *overrides: str) -> Path:
    done = holdfast("train", "digits", *TINY, "threat=linf:0.01", "optimizer.lr=0.02", *overrides, "--runs", runs)
    assert done.exit_code == 0, done.output
    return Path(done.stdout.splitlines()[-1])


def test_a_clean_run_passes_and_the_table_says_what_was_done(tmp_path: Path) -> None:
    run = trained(tmp_path)
    for name in (run, next((run / "evaluations").iterdir())):
        done = holdfast("audit", name, "--steps", 5, "--restarts", 2, "--runs", tmp_path)
        assert done.exit_code == 0, done.output
        assert "no contradiction" in done.stdout
        (count,) = re.findall(r"certified images audited +(\d+)", done.stdout)
        assert int(count) > 8
        assert float(re.findall(r"smallest margin found +(\S+)", done.stdout)[0]) > 0
        assert Path(done.stdout.splitlines()[-1]).parent == run / "evaluations"
    assert not list(tmp_path.rglob("alarm.npz"))


def test_a_lie_that_the_cheap_audit_does_not_reach_rings_and_the_example_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "liar.py").write_text(LIAR)
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    run = trained(runs, "evaluation.certifiers=[liar:Liar]", "evaluation.curve_points=0")
    done = holdfast("audit", run, "--steps", 5, "--restarts", 1, "--runs", runs)
    assert done.exit_code == 3, done.output
    assert re.search(
        r"SOUNDNESS ALARM: .* example \d+ is certified by .* up to 0\.9 .* the audit breaks", done.stderr
    )
    (alarm,) = runs.rglob("alarm.npz")
    assert alarm.parent.parent.name == "evaluations"
    with np.load(alarm) as kept:
        assert np.abs(kept["x_adv"].astype(float) - kept["x"]).max() <= 0.9


def test_where_there_is_nothing_to_audit_it_says_so(tmp_path: Path) -> None:
    run = trained(tmp_path, "evaluation.certifiers=[]")
    done = holdfast("audit", run, "--runs", tmp_path)
    assert done.exit_code == 2
    assert "no deterministic certificates" in done.stderr
