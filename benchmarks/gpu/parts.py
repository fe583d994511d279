"""What is measured, part by part; each gives numbers that json can write."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from holdfast import Threat, evaluate
from holdfast.attacks import Attack
from holdfast.bounds import METHODS, bound_margins
from holdfast.certify import SmoothingCertifier
from holdfast.data import ImageSet, load_data
from holdfast.models import build
from holdfast.objectives import Objective
from holdfast.training import Adam, Constant, Reporter, Training, fit
from holdfast.training.engine import Engine

MNIST, CIFAR10 = (1, 28, 28), (3, 32, 32)


@dataclass(frozen=True)
class Setting:
    """Where and how much."""

    device: str
    tiny: bool

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def images(self, count: int, shape: tuple[int, int, int]) -> ImageSet:
        """Random ones, which cost the same as others."""
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (count, *shape), generator=generator).to(torch.uint8)
        return ImageSet(pixels, torch.randint(0, 10, (count,), generator=generator), tuple("0123456789"))

    def engine(self) -> Any:
        return Engine(accelerator="gpu" if self.device == "cuda" else "cpu").start()


def network(name: str, shape: tuple[int, int, int]) -> nn.Module:
    torch.manual_seed(0)
    return build(name, input_shape=shape, num_classes=10).eval()


def answers(setting: Setting, left: float) -> dict[str, Any]:
    """Every bound method and attack against the CPU: the largest difference of margins from float64, and how often
    two runs were the same bit for bit."""
    found: dict[str, Any] = {}
    model, images = network("cnn-small", MNIST), setting.images(4 if setting.tiny else 32, MNIST)
    x, _ = images.batch(slice(None))
    y = model(x).argmax(1)
    exact = network("cnn-small", MNIST).double()
    there, tx, ty = network("cnn-small", MNIST).to(setting.device), x.to(setting.device), y.to(setting.device)
    for method in METHODS:
        if setting.tiny and method not in ("ibp", "crown-ibp", "bcp"):
            continue
        threat = Threat("l2" if method in ("bcp", "lmt") else "linf", 0.01)
        twice = [bound_margins(there, tx, ty, threat, method=method).cpu() for _ in range(2)]
        wanted = bound_margins(exact, x.double(), y, threat, method=method)
        error = float((twice[0].double() - wanted).detach().abs().max())
        found[method] = {"largest error": error, "same twice": torch.equal(*twice)}
    for name in ("pgd", "apgd", "fab", "square"):
        known = Attack.registry[name].model_fields
        attack = Attack.parse({"name": name} | {k: 10 for k in ("steps", "queries") if k in known})
        results = [attack(there, tx, ty, Threat("linf", 0.1)) for _ in range(2)]
        cpu = attack(network("cnn-small", MNIST), x, y, Threat("linf", 0.1))
        same = torch.equal(results[0].x_adv, results[1].x_adv)
        differ = int((results[0].success.cpu() != cpu.success).sum())
        found[name] = {"same twice": same, "verdicts unlike the CPU's": differ}
    return found


def waits(setting: Setting, left: float) -> dict[str, Any]:
    """Synchronisations that CUDA itself reports in steps of training."""
    found: dict[str, Any] = {}
    for name, (loss, threat, shape) in LOSSES.items():
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            if setting.device == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            try:
                steps(setting, "cnn-small", loss, threat, shape, 8)
            finally:
                if setting.device == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        found[name] = sum("synchroniz" in str(one.message) for one in seen)
    return found


LOSSES: dict[str, tuple[dict[str, Any], str, tuple[int, int, int]]] = {
    "ibp": ({"name": "ibp", "ramp_end": 1}, "linf:0.1", MNIST),
    "crown-ibp": ({"name": "crown-ibp", "ramp_end": 1}, "linf:0.1", MNIST),
    "bcp": ({"name": "bcp", "ramp_end": 1}, "l2:1.58", MNIST),
    "adversarial": ({"name": "adversarial", "steps": 10}, "linf:8/255", CIFAR10),
}


class Clock(Reporter):
    """The time of each step, the device's work included."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.times = setting, []

    def step(self, loss: Tensor) -> None:
        self.setting.wait()
        self.times.append(time.perf_counter())


def steps(
    setting: Setting, name: str, loss: dict[str, Any], threat: str, shape: tuple[int, int, int], count: int
) -> list[float]:
    """Milliseconds of so many steps in batches of 50."""
    clock, batch = Clock(setting), 4 if setting.tiny else 50
    plan = Training(steps=count, batch_size=batch)
    images = setting.images(count * batch, shape)
    rest = Objective.parse(loss), Threat.parse(threat), Adam(lr=1e-4), Constant(), plan, setting.engine()
    fit(network(name, shape), images, *rest, reporter=clock)
    return [1e3 * (after - before) for before, after in zip(clock.times, clock.times[1:], strict=False)]


def training(setting: Setting, left: float) -> dict[str, Any]:
    """Milliseconds a step, in the middle of the ramp."""
    found = {}
    for name, (loss, threat, shape) in LOSSES.items():
        deep = "cnn-small" if setting.tiny else "preact-resnet18" if shape == CIFAR10 else "cnn-4c3f"
        times = steps(setting, deep, loss, threat, shape, 4 if setting.tiny else 60)
        found[name] = {"network": deep, "ms": statistics.median(times), "fastest": min(times)}
    return found


def attacking(setting: Setting, left: float) -> dict[str, Any]:
    """Seconds of PGD by the number of images at once."""
    found, model = {}, network("cnn-small", CIFAR10).to(setting.device)
    for size in (8,) if setting.tiny else (256, 1024, 4096):
        x, y = (part.to(setting.device) for part in setting.images(size, CIFAR10).batch(slice(None)))
        attack = Attack.parse({"name": "pgd", "steps": 4 if setting.tiny else 100})
        setting.wait()
        began = time.perf_counter()
        attack(model, x, y, Threat("linf", 8 / 255), batch_size=size)
        setting.wait()
        found[str(size)] = {"seconds": time.perf_counter() - began}
    return found


def smoothing(setting: Setting, left: float) -> dict[str, Any]:
    """Noisy samples a second by the size of a batch."""
    found, model = {}, network("cnn-small", CIFAR10).to(setting.device)
    x, y = (part.to(setting.device) for part in setting.images(4, CIFAR10).batch(slice(None)))
    for size in (64,) if setting.tiny else (400, 1600, 6400):
        count = 128 if setting.tiny else 20_000
        certifier = SmoothingCertifier(sigma=0.25, n=count, n0=64, mode="fixed")
        setting.wait()
        began = time.perf_counter()
        certifier(model, x, y, Threat("l2", 0.25), batch_size=size)
        setting.wait()
        found[str(size)] = {"samples/s": 4 * count / (time.perf_counter() - began)}
    return found


def bcp_mnist(setting: Setting, left: float) -> dict[str, Any]:
    """BCP on MNIST, 60 epochs of batches of 50 or as many as there is time for: accuracies of the test set."""
    splits = load_data("digits" if setting.tiny else "mnist")
    name = "cnn-small" if setting.tiny else "cnn-4c3f"
    model = build(name, input_shape=splits.train.shape, num_classes=10)
    threat = Threat("l2", 1.58)
    plan = Training(epochs=1 if setting.tiny else 60, batch_size=50, minutes=max(left / 60 - 1, 0.05))
    history = fit(
        model, splits.train, Objective.parse("bcp"), threat, Adam(lr=1e-3), Constant(), plan, setting.engine()
    )  # fmt: skip
    x, y = splits.test.batch(slice(16 if setting.tiny else None))
    attack = {"name": "pgd", "steps": 3 if setting.tiny else 100}
    summary = evaluate(
        model.to(setting.device), x, y, threat, [attack], [{"name": "bounds", "method": "bcp"}]
    ).summary
    accuracies = {key: summary[key] for key in ("standard", "attacked", "certified")}
    return {
        "epochs": len(history),
        "seconds of training": sum(one["train_seconds"] for one in history),
        **accuracies,
    }


PARTS: dict[str, tuple[Callable[[Setting, float], Any], float]] = {
    "right-answers": (answers, 45),
    "right-waits": (waits, 30),
    "fast-training": (training, 45),
    "fast-attack": (attacking, 30),
    "fast-smoothing": (smoothing, 30),
    "row-bcp-mnist": (bcp_mnist, 120),
}
"""Each with the seconds that it wants at least."""
