"""Sweeps: what is planned, and that nothing is lost or done twice whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from helpers import TINY

from holdfast.experiments import Run, resolve
from holdfast.experiments.sweeps import sweep as module
from holdfast.experiments.sweeps.axes import parse_axis
from holdfast.experiments.sweeps.cost import estimate
from holdfast.experiments.sweeps.launchers import Here, Launcher, Pool, Stopped, WorkerDied
from holdfast.experiments.sweeps.sweep import Outcome, Planned, Watcher, plan, sweep

FAST = [*TINY, "evaluation.certifiers=[]", "evaluation.train_examples=2", "evaluation.lipschitz_examples=2"]
PROGRAM = [sys.executable, "-m", "holdfast"]


def test_every_combination_once_with_the_same_work_for_every_size() -> None:
    axes = [
        parse_axis("objective=trades,adversarial,trades"),
        parse_axis("data.train_size=100,200"),
        parse_axis("training.presentations=of(60 * data.train_size)"),
        parse_axis("optimizer.lr=uniform(0.1,0.2)"),
    ]
    found = plan("digits", axes, trials=2, seeds=3)
    assert len(found) == len({one.identity for one in found}) == 2 * 2 * 2 * 3
    assert {one.experiment.training.presentations for one in found} == {6000, 12000}
    assert {one.experiment.seed for one in found} == {0, 1, 2}
    more = plan("digits", axes, trials=4, seeds=3)
    assert {one.identity for one in found} < {
        one.identity for one in more
    }  # further trials add, and change nothing
    assert found[0].labels.keys() == {"objective", "data.train_size", "optimizer.lr", "seed"}


@pytest.mark.parametrize(
    ("axes", "counts", "message"),
    [
        (["objective=trades,tradez"], {}, "did you mean 'trades'"),
        (["optimizer.lr=uniform(0,1)"], {}, "is random: say how often"),
        ([], {"trials": 3}, "nothing is random"),
        ([], {"seeds": 0}, "at least one seed"),
        (["optimiser.lr=1"], {}, "did you mean 'optimizer'"),
    ],
)
def test_a_plan_with_one_bad_run_is_no_plan(axes: list[str], counts: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan("digits", [parse_axis(axis) for axis in axes], **counts)


def small_plan(*axes: str) -> list[Planned]:
    return plan("digits", [parse_axis(axis) for axis in (*FAST, *axes)])


class Ends(Watcher):
    def __init__(self) -> None:
        self.ended: list[Outcome] = []
        self.said: list[str] = []
        self.finished = 0

    def begin(self, plan: Sequence[Planned], left: Sequence[Planned]) -> None:
        self.finished = len(plan) - len(left)

    def end(self, outcome: Outcome) -> None:
        self.ended.append(outcome)

    def say(self, text: str) -> None:
        self.said.append(text)


def test_a_failed_run_stops_no_other_and_finished_ones_are_not_repeated(tmp_path: Path) -> None:
    found = small_plan("objective=cross-entropy", "optimizer.lr=0.01,1e30")
    first = sweep(found, Here(), runs=tmp_path)
    assert [one.status for one in first] == ["finished", "failed"]
    assert "the loss is" in first[1].text
    before = (tmp_path / found[0].folder / "result.json").stat().st_mtime_ns
    ends = Ends()
    again = sweep(
        [*found, *small_plan("objective=cross-entropy", "optimizer.lr=0.02")], Here(), runs=tmp_path, watcher=ends
    )
    assert [one.status for one in again] == ["finished", "failed", "finished"]
    assert (ends.finished, len(ends.ended)) == (1, 2)
    assert (tmp_path / found[0].folder / "result.json").stat().st_mtime_ns == before
    assert not (tmp_path / found[0].training / "progress.json").exists()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda run, below: (run / "recipe.yaml").write_text("][ rubbish"),
        lambda run, below: (below / "result.json").write_text("rubbish"),
        lambda run, below: (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text() + "seed: 9\n"),
        lambda run, below: (
            (run / "model.safetensors").unlink(),
            (run / "checkpoint" / "last.pt").write_bytes(b"rubbish"),
        ),
    ],
    ids=["recipe", "result", "another run's", "checkpoint"],
)
def test_a_damaged_folder_is_put_aside_and_begun_anew(
    spoil: Callable[[Path, Path], object], tmp_path: Path
) -> None:
    (one,) = found = small_plan("objective=cross-entropy")
    sweep(found, Here(), runs=tmp_path)
    training, below = tmp_path / one.training, tmp_path / one.folder
    expected = Run(below).result["counts"]
    spoil(training, below)
    (outcome,) = sweep(found, Here(), runs=tmp_path)
    assert outcome.status == "finished"
    assert Run(below).result["counts"] == expected
    (aside,) = (tmp_path / ".damaged").iterdir()
    assert aside.name in (f"{training.name}-1", f"{below.name}-1")
    from holdfast.experiments.records.record import read_records

    assert len(read_records(tmp_path)) == 1  # counted once


class Mortal(Launcher):
    """Loses the worker of some attempts."""

    def __init__(self, deaths: int) -> None:
        self.deaths, self.attempts = deaths, 0

    def submit(self, work: Callable[[Any], Any], arguments: Sequence[Any]) -> list[Future[Any]]:
        futures = []
        for argument in arguments:
            future: Future[Any] = Future()
            self.attempts += 1
            if self.attempts <= self.deaths:
                future.set_exception(WorkerDied("killed"))
            else:
                future.set_result(work(argument))
            futures.append(future)
        return futures

    def stop(self, now: bool) -> None:
        pass


@pytest.mark.parametrize(("deaths", "status"), [(2, "finished"), (9, "failed")])
def test_what_died_is_tried_again_but_not_for_ever(deaths: int, status: str, tmp_path: Path) -> None:
    ends, launcher = Ends(), Mortal(deaths)
    (outcome,) = sweep(small_plan("objective=cross-entropy"), launcher, runs=tmp_path, watcher=ends)
    assert outcome.status == status
    assert launcher.attempts == 3
    assert len(ends.said) == 2


def test_a_run_in_other_hands_is_left_to_them(tmp_path: Path) -> None:
    (one,) = found = small_plan("objective=cross-entropy")
    ends, outcomes = Ends(), []
    with Run(tmp_path / one.training).claimed():
        thread = threading.Thread(target=lambda: outcomes.extend(sweep(found, Here(), runs=tmp_path, watcher=ends)))
        thread.start()
        wait_for(lambda: bool(ends.said))
    thread.join(timeout=300)
    assert [one.status for one in outcomes] == ["finished"]
    assert ends.said == [f"{one.identity} is worked on by another process: waits for it"]


def test_work_in_this_process_ends_when_told(tmp_path: Path) -> None:
    (one,) = small_plan("objective=cross-entropy", "training={epochs: 2000, batch_size: 40}")
    launcher = Here()
    (future,) = launcher.submit(module.work, [(one.experiment.model_dump(mode="json"), str(tmp_path))])
    wait_for(lambda: (tmp_path / one.training / "history.jsonl").exists())
    launcher.stop(now=True)
    assert isinstance(future.exception(), Stopped)
    assert (tmp_path / one.training / "checkpoint" / "last.pt").exists()
    assert not Run(tmp_path / one.training).finished


def test_the_cost_is_counted_and_timed() -> None:
    found = plan("digits", [parse_axis("training.epochs=2,4"), parse_axis("data.train_size=128")])
    cost = estimate(found)
    assert (cost.runs, cost.batches) == (2, 4 + 8)
    assert cost.seconds > 0


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def workers_of(process: int) -> list[int]:
    found = subprocess.run(
        ["pgrep", "-P", str(process), "-f", "spawn_main"], capture_output=True, text=True, check=False
    )
    return [int(line) for line in found.stdout.split()]


@pytest.mark.slow
def test_killed_sweeps_and_workers_lose_nothing(tmp_path: Path) -> None:
    long = ["training={epochs: 120, batch_size: 40, validation_examples: 10}", "evaluation.curve_points=0"]
    command = [*PROGRAM, "sweep", "digits", "objective=cross-entropy", *FAST, *long, "seed=0,1", "--workers", "2"]
    command += ["--runs", str(tmp_path)]
    found = [
        resolve("digits", ["objective=cross-entropy", *FAST, *long, f"seed={seed}"]).identity for seed in (0, 1)
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def epochs(identity: str) -> int:
        history = tmp_path / identity / "history.jsonl"
        return history.read_text().count('"epoch"') if history.exists() else 0

    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        wait_for(lambda: all(epochs(identity) > 3 for identity in found))
        children = workers_of(process.pid)
        assert len(children) == 2
        process.kill()
        process.wait()
    for child in children:  # they follow their parent
        wait_for(lambda child=child: not Path(f"/proc/{child}").exists())
    reached = [epochs(identity) for identity in found]
    assert all(3 < count < 120 for count in reached)

    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        wait_for(lambda: any(epochs(identity) > count for identity, count in zip(found, reached, strict=True)))
        with contextlib.suppress(ProcessLookupError):
            os.kill(workers_of(process.pid)[0], signal.SIGKILL)
        assert process.wait(timeout=120) == 0
    text = (tmp_path / "log").read_text()
    assert "the worker process was killed" in text
    assert text.count(" finished (") == 2
    for identity in found:
        assert Run(tmp_path / identity).history["epoch"].tolist() == [*range(1, 121)]  # gone on with, nothing twice


@pytest.mark.slow
def test_submitit_runs_the_same_plan(tmp_path: Path) -> None:
    from holdfast.experiments.sweeps.launchers import launcher

    found = small_plan("objective=cross-entropy", "seed=0,1")
    chosen = launcher("local", 2, folder=tmp_path / ".jobs", resources={"timeout_min": 5})
    outcomes = sweep(found, chosen, runs=tmp_path)
    assert [one.status for one in outcomes] == ["finished", "finished"], outcomes


def test_launchers_that_cannot_be(tmp_path: Path) -> None:
    from holdfast.experiments.sweeps.launchers import launcher

    for on, options, message in (
        ("mars", {}, "valid: local, pool, ray, slurm"),
        ("pool", {"resources": {"gpus": 1}}, "are for slurm"),
        ("local", {"address": "x"}, "an address is for ray"),
        ("local", {"resources": {"timeot_min": 1}}, "submitit: "),
    ):
        with pytest.raises(ValueError, match=message):
            launcher(on, 1, folder=tmp_path, **options)


@pytest.mark.slow
def test_a_pool_of_processes_works_and_stops(tmp_path: Path) -> None:
    pool = Pool(1)
    assert module.sweep(small_plan("objective=cross-entropy"), pool, runs=tmp_path)[0].status == "finished"
    assert all(not process.is_alive() for one in pool._pools for process in (one._processes or {}).values())
