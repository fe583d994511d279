"""A sweep on a real Ray cluster of two nodes on this machine: make test-ray."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from helpers import TINY
from ray.cluster_utils import Cluster

from holdfast.experiments import Run
from holdfast.experiments.sweeps.axes import parse_axis
from holdfast.experiments.sweeps.launchers import launcher
from holdfast.experiments.sweeps.sweep import Outcome, Watcher, plan, sweep

FAST = [*TINY, "objective=cross-entropy", "evaluation.certifiers=[]", "evaluation.train_examples=2"]


@pytest.fixture(autouse=True)
def unchanged_world() -> None:
    """Ray keeps variables and draws port numbers as it likes."""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of two nodes with a core and a pretended GPU each."""
    monkeypatch.setenv("RAY_worker_niceness", "0")  # or busy machines starve them
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1})
    found.add_node(num_cpus=1, num_gpus=1)
    yield str(found.address)
    ray.shutdown()
    found.shutdown()


def test_two_nodes_share_a_sweep_and_a_killed_worker_loses_nothing(cluster: str, tmp_path: Path) -> None:
    long = ["training={epochs: 120, batch_size: 40, validation_examples: 10}", "evaluation.curve_points=0"]
    found = plan("digits", [parse_axis(axis) for axis in (*FAST, *long, "seed=0,1,2,3")])
    said: list[str] = []

    class Ear(Watcher):
        def say(self, text: str) -> None:
            said.append(text)

    chosen = launcher("ray", 2, folder=tmp_path, address=cluster, resources={"num_cpus": 0.5, "num_gpus": 0.5})
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.extend(sweep(found, chosen, runs=tmp_path, watcher=Ear())))
    thread.start()
    workers: list[str] = []
    end = time.monotonic() + 120
    while not (workers and list(tmp_path.glob("*/history.jsonl"))) and time.monotonic() < end:
        listed = subprocess.run(["pgrep", "-f", "ray::work"], capture_output=True, text=True, check=False)
        workers = listed.stdout.split()
        time.sleep(0.1)
    assert len(workers) > 1
    os.kill(int(workers[0]), signal.SIGKILL)
    thread.join(timeout=240)
    assert [one.status for one in outcomes] == ["finished"] * 4, outcomes
    assert any("tried again" in text for text in said)
    for one in found:
        assert Run(tmp_path / one.training).history["epoch"].tolist() == [*range(1, 121)]
