"""What it costs that certificates account for rounding: time, and images that are no longer certified.

    HOLDFAST_DATA=... python benchmarks/rounding.py

A network trained by IBP on MNIST (l_inf 0.1, ``cnn-small``, three epochs) is evaluated on 1,000 test images with
PGD-100 and one certifier, with and without the terms of ``holdfast.bounds.rounding``, in turns. Ratios are of
process CPU seconds, of the whole evaluation and of the certifier alone: medians over rounds, and their range.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from holdfast import Threat, evaluate
from holdfast.bounds import region_of
from holdfast.certify import BoundCertifier
from holdfast.certify import bounds as certify_bounds
from holdfast.data import load_data
from holdfast.models import build
from holdfast.objectives import IBP
from holdfast.training import Adam, OneCycle, Training, fit
from holdfast.training.engine import Engine

IMAGES, ROUNDS = 1000, 3
THREAT = Threat("linf", 0.1)
METHODS = ("ibp", "crown-ibp", "cascade")


def network(train: Any) -> nn.Module:
    torch.manual_seed(0)
    model = build("cnn-small", input_shape=(1, 28, 28), num_classes=10)
    settings, engine = Training(epochs=3, batch_size=128), Engine(accelerator="cpu").start()
    fit(model, train, IBP(ramp_end=0.7), THREAT, Adam(lr=2e-3), OneCycle(), settings, engine)
    return model.eval()


@contextlib.contextmanager
def without_rounding() -> Iterator[None]:
    """Bounds as they are computed, in float32, with nothing taken from them."""

    def plain(x: Tensor, threat: Threat, eps: Tensor | None = None, rounding: Any = None) -> Any:
        return region_of(x, threat, eps)

    with mock.patch.object(certify_bounds, "region_of", plain):
        yield


def cpu_seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = call()
    return time.process_time() - started, result


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} – {max(ratios):.2f})"


def main() -> None:
    torch.set_num_threads(1)
    data = load_data("mnist")
    model = network(data.train)
    x, y = data.test.batch(torch.arange(IMAGES))
    print("| method | evaluation | certifier | certified with | without | changed, by what margin |")
    print("| --- | --- | --- | --- | --- | --- |")
    for method in METHODS:
        certifier = BoundCertifier(method=method)
        wholes, alones = [], []
        for _ in range(ROUNDS):
            with without_rounding():
                before, plain = cpu_seconds(lambda c=certifier: evaluate(model, x, y, THREAT, [PGD], [c]))
                alone_before, old = cpu_seconds(lambda c=certifier: c(model, x, y, THREAT))
            after, sound = cpu_seconds(lambda c=certifier: evaluate(model, x, y, THREAT, [PGD], [c]))
            alone_after, new = cpu_seconds(lambda c=certifier: c(model, x, y, THREAT))
            wholes.append(after / before)
            alones.append(alone_after / alone_before)
        (name,) = sound.summary["certified"]
        counts = [round(IMAGES * one.summary["certified"][name]) for one in (sound, plain)]
        changed = (old.verified != new.verified).nonzero().squeeze(1)
        margins = ", ".join(f"{value:.1e}" for value in old.margin[changed].tolist()) or "none"
        print(
            f"| {method} | {spread(wholes)} | {spread(alones)} | {counts[0]} | {counts[1]} | {margins} |",
            flush=True,
        )


PGD = {"name": "pgd", "steps": 100}

if __name__ == "__main__":
    main()
