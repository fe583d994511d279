"""Neural-collapse metrics against the ways they are usually computed, in one run.

    pip install -r benchmarks/neural-collapse-requirements.txt; python benchmarks/neural_collapse.py

Random features of ten or a hundred classes. Outer products: one n × d × d tensor for each class and batch of 128,
as the code of Su et al. (2024) does, and a pseudo-inverse of the d × d matrix. Two passes: class means first, then
one d × d product per batch. Both written for this benchmark in float64, NC1 alone. holdfast: everything that
``neural_collapse`` gives, and the one-pass meter. ``kowalski`` computes another NC1; where the metric is the same
(CDNV, self-duality) the values must agree. Last, what the observer adds to an epoch of adversarial training. One
thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from holdfast import Threat
from holdfast.analysis import CollapseMeter, neural_collapse
from holdfast.data import ImageSet
from holdfast.experiments.analyses import NeuralCollapseAnalysis
from holdfast.models import build
from holdfast.objectives import AdversarialTraining
from holdfast.training import SGD, Constant, Training, fit
from holdfast.training.engine import Engine

BATCH = 128


def means_of(x: Tensor, y: Tensor, classes: int) -> Tensor:
    sums = torch.zeros(classes, x.shape[1], dtype=torch.float64)
    for features, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
        sums.index_add_(0, labels, features.double())
    return sums / torch.bincount(y, minlength=classes)[:, None]


def nc1(within: Tensor, x: Tensor, y: Tensor, means: Tensor) -> float:
    counts = torch.bincount(y, minlength=len(means)).double()
    centred = means - (counts / counts.sum()) @ means
    between = centred.T @ centred / len(means)
    return (torch.trace(within / len(x) @ torch.linalg.pinv(between, hermitian=True)) / len(means)).item()


def outer_products(x: Tensor, y: Tensor, classes: int) -> float:
    means = means_of(x, y, classes)
    within = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for features, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
        for label in range(classes):
            away = features[labels == label].double() - means[label]
            within += (away[:, :, None] * away[:, None, :]).sum(0)
    return nc1(within, x, y, means)


def two_passes(x: Tensor, y: Tensor, classes: int) -> float:
    means = means_of(x, y, classes)
    within = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for features, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
        away = features.double() - means[labels]
        within += away.T @ away
    return nc1(within, x, y, means)


def one_pass(x: Tensor, y: Tensor, classes: int) -> float:
    meter = CollapseMeter(classes)
    for features, labels in zip(x.split(1024), y.split(1024), strict=True):
        meter.update(features, labels)
    return meter.compute().nc1


def timed(function: Callable[[], float], repeats: int) -> tuple[float, float]:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        value = function()
        times.append(time.perf_counter() - started)
    return float(np.median(times)), value


def compare(number: int, classes: int, slow: bool, repeats: int) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, classes, (number,), generator=generator)
    centres = torch.randn(classes, 512, generator=generator)
    x = centres[y] + torch.randn(number, 512, generator=generator)
    weight = torch.randn(classes, 512, generator=generator)
    sides: dict[str, Callable[[], float]] = {
        **({"outer products": lambda: outer_products(x, y, classes)} if slow else {}),
        "two passes": lambda: two_passes(x, y, classes),
        "holdfast, one pass": lambda: one_pass(x, y, classes),
        "holdfast, all metrics": lambda: neural_collapse(x, y, weight).nc1,
    }
    found = {name: timed(side, 1 if name == "outer products" else repeats) for name, side in sides.items()}
    fastest = found["holdfast, all metrics"][0]
    for name, (seconds, value) in found.items():
        print(f"| {number} | {classes} | {name} | {1000 * seconds:.0f} | {seconds / fastest:.1f} | {value:.9f} |")
    values = [value for _, value in found.values()]
    assert max(values) - min(values) <= 1e-7 * max(values)
    if slow:
        beside_kowalski(x, y, weight, fastest)


def beside_kowalski(x: Tensor, y: Tensor, weight: Tensor, fastest: float) -> None:
    """All that the package has; what is the same metric must be the same number."""
    try:
        from kowalski import to_per_class_list
        from kowalski.neural_collapse import neural_collapse_metrics
    except ImportError:
        print("kowalski is not installed: pip install -r benchmarks/neural-collapse-requirements.txt")
        return
    bias = torch.zeros(len(weight))
    started = time.perf_counter()
    theirs = neural_collapse_metrics(to_per_class_list(x, y), weight, bias)
    seconds = time.perf_counter() - started
    ours = neural_collapse(x, y, weight, bias)
    print(f"| {len(x)} | {len(weight)} | kowalski | {1000 * seconds:.0f} | {seconds / fastest:.1f} | another |")
    for name, value in (("class_distance_normalized_variance", ours.cdnv), ("self_duality", ours.dual_etf_error)):
        other = theirs[name].item()
        assert abs(other - value) <= 1e-4 * abs(value), (name, other, value)


def observed_epoch(images: int) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, 32, 32), generator=generator, dtype=torch.uint8)
    data = ImageSet(pixels, torch.arange(images) % 10, tuple("0123456789"))
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(3):
        for watched in (False, True):
            torch.manual_seed(0)
            model = build("preact-resnet18", input_shape=(3, 32, 32), num_classes=10, width=16)
            objective, threat = AdversarialTraining(), Threat("linf", 0.03)
            watcher = NeuralCollapseAnalysis().watch(model, objective, threat, lambda progress: 0.1)
            settings = objective, threat, SGD(lr=0.01), Constant(), Training(epochs=1, batch_size=128)
            engine = Engine(accelerator="cpu").start()
            started = time.perf_counter()
            fit(model, data, *settings, engine, observers=[watcher] if watched else [])
            times[watched].append(time.perf_counter() - started)
    plain, more = (float(np.median(times[watched])) for watched in (False, True))
    print(
        f"an epoch of PGD-10, {images} images: {plain:.1f} s, with the observer {100 * (more / plain - 1):+.1f} %"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=512, help="of the epoch that is observed")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| features | classes | how | milliseconds | times holdfast | NC1 |")
    print("|---|---|---|---|---|---|")
    compare(2_000, 10, True, 5)
    compare(2_000, 100, True, 5)
    compare(50_000, 10, False, 3)
    observed_epoch(given.images)


if __name__ == "__main__":
    main()
