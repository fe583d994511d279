"""Milliseconds of CPU a training step takes, everything around it included: certified losses on small networks.

    HOLDFAST_DATA=... python benchmarks/steps.py [loss ...]

Time is the process's own on one thread, so that what else the machine does is not in it: the median over steps,
and the fastest. MNIST's row is there where HOLDFAST_DATA is.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor

from holdfast import Threat
from holdfast.data import load_data
from holdfast.listeners import Reporter
from holdfast.models import build
from holdfast.objectives import Objective
from holdfast.training import Adam, Constant, Training, fit
from holdfast.training.engine import Engine

LOSSES: dict[str, tuple[dict[str, Any], str, str, str, int]] = {
    "cross-entropy": ({"name": "cross-entropy"}, "digits", "cnn-small", "linf:0.1", 128),
    "ibp": ({"name": "ibp"}, "digits", "cnn-small", "linf:0.1", 128),
    "crown-ibp": ({"name": "crown-ibp"}, "digits", "cnn-small", "linf:0.1", 128),
    "one-step": ({"name": "one-step-relaxation", "fused": True}, "digits", "cnn-small", "linf:0.1", 128),
    "bcp": ({"name": "bcp"}, "digits", "cnn-small", "l2:0.3", 128),
    "lmt": ({"name": "lmt"}, "digits", "cnn-small", "l2:0.3", 128),
    "bcp-mnist": ({"name": "bcp"}, "mnist", "cnn-4c3f", "l2:1.58", 50),
    "plain-mnist": ({"name": "cross-entropy"}, "mnist", "cnn-4c3f", "l2:1.58", 50),
}
STEPS = {"digits": 60, "mnist": 14}


class Stopwatch(Reporter):
    """The process's time at each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def step(self, loss: Tensor) -> None:
        self.times.append(time.process_time())

    @property
    def milliseconds(self) -> list[float]:
        """Of each step but the first ones."""
        return [1e3 * (after - before) for before, after in zip(self.times[4:], self.times[5:], strict=False)]


def measured(name: str) -> list[float]:
    """Milliseconds of each step in the middle of the ramp, where both parts of a loss count."""
    loss, data, network, threat, batch = LOSSES[name]
    images = load_data(data).train
    torch.manual_seed(0)
    model = build(network, input_shape=images.shape, num_classes=10)
    objective = Objective.parse(
        loss | ({"warmup": 0.0, "ramp_end": 1.0} if loss["name"] != "cross-entropy" else {})
    )
    watch, engine = Stopwatch(), Engine(accelerator="cpu").start()
    plan = Training(steps=STEPS[data], batch_size=batch)
    fit(model, images, objective, Threat.parse(threat), Adam(lr=1e-4), Constant(), plan, engine, reporter=watch)
    return watch.milliseconds


def main() -> None:
    torch.set_num_threads(1)
    names = sys.argv[1:] or [name for name in LOSSES if "mnist" not in name or "HOLDFAST_DATA" in os.environ]
    print("| loss | data, network, batch | median, ms | fastest, ms |\n| --- | --- | --- | --- |")
    for name in names:
        times = measured(name)
        _, data, network, _, batch = LOSSES[name]
        row = f"| {name} | {data}, {network}, {batch} | {statistics.median(times):.2f} | {min(times):.2f} |"
        print(row, flush=True)


if __name__ == "__main__":
    main()
