"""What a step of each hot loop asks of the device: operators, and times that the host waits for it.

Counted is the difference between a longer and a shorter run, divided by the steps between: what a run does once
does not count. A loop that needs more than its budget fails; one that needs much less should have a smaller budget.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from device import host_device
from device.test_training import OneDevice
from helpers import images, small_cnn
from torch import nn

from holdfast import Threat
from holdfast.attacks import Attack
from holdfast.certify import SmoothingCertifier
from holdfast.data import ImageSet
from holdfast.layers import AOLConv2d, AOLLinear, CPLConv2d, CPLLinear, MaxMin, SLLConv2d, SLLLinear, SOCConv2d
from holdfast.models import build
from holdfast.objectives import Objective
from holdfast.training import Adam, Constant, Training, fit


class Budget(NamedTuple):
    """Of one step."""

    operators: float
    waits: float


Run = Callable[[int], object]
"""A run of so many steps."""


def keeps(name: str, run: Run, budget: Budget, short: int, long: int) -> None:
    """Counts a step of the run and holds it against its budget."""
    run(short)  # what is compiled or kept the first time
    counts = []
    for steps in (short, long):
        with host_device.watch() as seen:
            run(steps)
        counts.append((seen.launches, seen.waits))
    operators, waits = ((after - before) / (long - short) for before, after in zip(*counts, strict=True))
    host_device.COUNTED.append(
        f"{name:28s} {operators:8.1f} of {budget.operators:6g}   {waits:6.2f} of {budget.waits:4g}"
    )
    assert operators <= budget.operators, seen.report()
    assert waits <= budget.waits, seen.report()


ATTACKS: dict[str, tuple[dict[str, Any], str, int, int, Budget]] = {
    "PGD": ({"name": "pgd"}, "steps", 16, 48, Budget(80, 0.25)),
    "PGD, l_2": ({"name": "pgd"}, "steps", 16, 48, Budget(95, 0.25)),
    "APGD": ({"name": "apgd"}, "steps", 16, 48, Budget(135, 0.25)),
    "Square": ({"name": "square"}, "queries", 32, 96, Budget(46, 2)),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_step_of_an_attack(name: str, device: str) -> None:
    settings, length, short, long, budget = ATTACKS[name]
    model, x = small_cnn().eval().to(device), images(12)[0].to(device)
    y = model(x).argmax(1)
    threat = Threat("l2" if "l_2" in name else "linf", 1e-4)  # nothing is found, so that all go on to the end

    def run(steps: int) -> object:
        return Attack.parse(settings | {length: steps})(model, x, y, threat)

    keeps(name, run, budget, short, long)


def trains(model: Callable[[], nn.Module], loss: dict[str, Any], threat: str, shape: tuple[int, int, int]) -> Run:
    """Training in the middle of the ramp of its loss, where both its parts count."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (200, *shape), generator=generator).to(torch.uint8)
    labels = torch.randint(0, 10, (200,), generator=generator)
    data = ImageSet(pixels, labels, tuple("0123456789"))

    def run(steps: int) -> object:
        plan = Training(steps=steps, batch_size=4)
        objective, engine = Objective.parse(loss), OneDevice(host_device.NAME)
        return fit(model(), data, objective, Threat.parse(threat), Adam(lr=1e-4), Constant(), plan, engine)

    return run


MNIST, CIFAR10 = (1, 28, 28), (3, 32, 32)
LOSSES: dict[str, tuple[str, dict[str, Any], str, tuple[int, int, int], Budget]] = {
    "cross-entropy": ("cnn-4c3f", {"name": "cross-entropy"}, "linf:0.1", MNIST, Budget(60, 0)),
    "IBP": ("cnn-4c3f", {"name": "ibp", "ramp_end": 1}, "linf:0.1", MNIST, Budget(355, 0)),
    "CROWN-IBP": ("cnn-4c3f", {"name": "crown-ibp", "ramp_end": 1}, "linf:8/255", CIFAR10, Budget(905, 0)),
    "one-step relaxation": (
        "cnn-4c3f", {"name": "one-step-relaxation", "fused": True, "ramp_end": 1}, "linf:8/255", CIFAR10,
        Budget(1570, 0),
    ),
    "BCP": ("cnn-4c3f", {"name": "bcp", "ramp_end": 1}, "l2:1.58", MNIST, Budget(950, 0)),
    "LMT": ("cnn-4c3f", {"name": "lmt", "ramp_end": 1}, "l2:1.58", MNIST, Budget(320, 0)),
    "adversarial training": ("cnn-4c3f", {"name": "adversarial", "steps": 8}, "linf:0.1", MNIST, Budget(600, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_of_training(name: str) -> None:
    network, loss, threat, shape, budget = LOSSES[name]
    run = trains(lambda: build(network, input_shape=shape, num_classes=10), loss, threat, shape)
    keeps(name, run, budget, 4, 12)


LAYERS: dict[str, tuple[type[nn.Module], type[nn.Module], Budget]] = {
    "AOL": (AOLConv2d, AOLLinear, Budget(1070, 0)),
    "CPL": (CPLConv2d, CPLLinear, Budget(310, 0)),
    "SLL": (SLLConv2d, SLLLinear, Budget(1310, 0)),
    "SOC": (SOCConv2d, AOLLinear, Budget(540, 0)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_step_of_lipschitz_layers(name: str) -> None:
    convolution, dense, budget = LAYERS[name]

    def model() -> nn.Module:
        layers = [convolution(4, 8), MaxMin(), convolution(8, 8), MaxMin(), nn.Flatten(), dense(512, 10)]
        return nn.Sequential(nn.ZeroPad2d(0), convolution(1, 4), *layers)

    keeps(name, trains(model, {"name": "margin-hinge"}, "l2:0.1", (1, 8, 8)), budget, 4, 12)


def test_a_batch_of_smoothing(device: str) -> None:
    model, x = small_cnn().eval().to(device), images(4)[0].to(device)
    y = model(x).argmax(1)

    def run(batches: int) -> object:
        certifier = SmoothingCertifier(sigma=0.25, n=100 * batches, n0=20, alpha=0.001, mode="fixed")
        return certifier(model, x, y, Threat("l2", 0.1))

    keeps("smoothing", run, Budget(110, 4), 8, 24)
