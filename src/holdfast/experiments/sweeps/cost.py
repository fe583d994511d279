"""What a plan's training will take, before it begins."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from holdfast.data import Images
from holdfast.experiments.recipes.experiment import Experiment
from holdfast.experiments.sweeps.sweep import Planned
from holdfast.inference import mix_seed
from holdfast.objectives import Objective, Progress


@dataclass(frozen=True)
class Cost:
    """What a plan's training will take, from the seconds of a few batches."""

    runs: int
    batches: int
    seconds: float
    """Of one worker on this machine, without validation and evaluation."""


def estimate(plan: Sequence[Planned], most: int = 6, workers: int = 1) -> Cost:
    """Time a batch of each kind of training in the plan, of at most so many kinds; the others take their mean.

    Args:
        workers: how many share this machine's cores.

    Raises:
        ValueError, OSError: the data, or a model that does not take them.
    """
    seconds: dict[str, float] = {}
    sizes: dict[str, int] = {}
    total, batches = 0.0, 0
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, min(threads, (os.cpu_count() or 1) // workers)))
    try:
        for one in plan:
            total, batches = _add_cost(one.experiment, seconds, sizes, most, total, batches)
    finally:
        torch.set_num_threads(threads)
    return Cost(len(plan), batches, total)


def _add_cost(
    experiment: Experiment, seconds: dict[str, float], sizes: dict[str, int], most: int, total: float, batches: int
) -> tuple[float, int]:
    """One run's batches and seconds on top of the others'."""
    objective = experiment.objective
    if objective is None:
        raise ValueError("the recipe has no objective: there is nothing to train")
    source = experiment.data.model_dump_json()
    parts = experiment.model, objective, experiment.threat, experiment.training.batch_size
    kind = " ".join([experiment.data.name, *map(str, parts)])
    new = kind not in seconds and len(seconds) < most
    if new or (source not in sizes and experiment.data.train_size is None):
        images = experiment.data.load().train
        sizes[source] = images.epoch_size
        if new:
            seconds[kind] = _seconds_of_a_batch(experiment, objective, images)
    images_per_epoch = sizes.get(source) or experiment.data.train_size or 1
    number = experiment.training.plan(images_per_epoch, objective.steps_per_batch).total
    return total + number * seconds.get(kind, float(np.mean(list(seconds.values())))), batches + number


def _seconds_of_a_batch(experiment: Experiment, objective: Objective, images: Images) -> float:
    """Of the second: the first warms up."""
    device = experiment.engine.start(alone=True).device
    x, y = (part.to(device) for part in images.batch(slice(experiment.training.batch_size)))
    with torch.random.fork_rng():
        torch.manual_seed(mix_seed(experiment.seed))
        model = experiment.model.build(images.shape, len(images.classes)).train().to(device)
        for _ in range(2):
            started = time.perf_counter()
            objective.loss(model, x, y, experiment.threat, Progress.end()).total.backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
    return time.perf_counter() - started
