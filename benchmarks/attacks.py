"""Attacks against their peers on MNIST: wall time and robust accuracy of both, same model, same budget, one run.

    pip install ... (see attacks-requirements.txt)
    HOLDFAST_DATA=... python benchmarks/attacks.py [pgd inner autoattack certified] [--images 500]

pgd: PGD-50 in l_inf against torchattacks, foolbox and adv-lib. inner: the PGD-10 of an adversarial training
step on a network with BatchNorm. autoattack: APGD-CE, APGD-T, FAB-T and Square at the published budgets
against torchattacks' parts at the same (its AutoAttack class takes 10 steps). certified: the same on an IBP-trained
network, where holdfast attacks nothing that is certified. The sides take turns; ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast import Threat, evaluate
from holdfast.attacks import PGD, AutoAttack
from holdfast.certify import BoundCertifier
from holdfast.data import load_data
from holdfast.inference import predict
from holdfast.models import build
from holdfast.objectives import IBP, AdversarialTraining
from holdfast.objectives.objective import Progress
from holdfast.training import Adam, Constant, Training, fit
from holdfast.training.engine import Engine
from holdfast.training.schedules import OneCycle

for unused in ("torchvision", "visdom"):  # adv-lib imports them for what is not used here
    sys.modules[unused] = types.ModuleType(unused)
sys.modules["torchvision"].models = types.ModuleType("torchvision.models")  # type: ignore[attr-defined]

import foolbox  # noqa: E402
import torchattacks  # noqa: E402
from adv_lib.attacks import pgd_linf  # noqa: E402

del sys.modules["torchvision"], sys.modules["visdom"]

EPS = 0.26

Side = Callable[[], Tensor]
"""Attacks and returns the adversarial images."""


def by_pgd() -> nn.Module:
    """cnn-4c3f trained by PGD-3 on 10,000 MNIST images: at eps 0.26 about 60 % robust."""
    splits = load_data("mnist", train_size=10_000)
    torch.manual_seed(0)
    model = build("cnn-4c3f", input_shape=(1, 28, 28), num_classes=10)
    engine = Engine(accelerator="cpu").start()
    for eps, epochs in ((0.0, 1), (0.1, 1), (0.2, 2)):  # from the start at full eps it learns nothing
        settings = Adam(lr=5e-4), Constant(), Training(epochs=epochs, batch_size=64), engine
        fit(model, splits.train, AdversarialTraining(steps=3, step_size=0.5), Threat("linf", eps), *settings)
    return model.eval().requires_grad_(False)


def by_ibp() -> nn.Module:
    """cnn-small trained by IBP on 15,000 MNIST images."""
    splits = load_data("mnist", train_size=15_000)
    torch.manual_seed(0)
    model = build("cnn-small", input_shape=(1, 28, 28), num_classes=10)
    settings = Adam(lr=3e-3), OneCycle(), Training(epochs=10, batch_size=128), Engine(accelerator="cpu").start()
    fit(model, splits.train, IBP(kappa=0.0), Threat("linf", 0.1), *settings)
    return model.eval().requires_grad_(False)


def compare(title: str, model: nn.Module, y: Tensor, sides: dict[str, Side], rounds: int) -> None:
    """Run all sides in turns and print a row for each; ratios are to the fastest peer."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    robust: dict[str, float] = {}
    for _ in range(rounds):
        for name, attack in sides.items():
            started = time.perf_counter()
            x_adv = attack()
            seconds[name].append(time.perf_counter() - started)
            robust[name] = (predict(model, x_adv).argmax(1) == y).double().mean().item()
    peers = [name for name in sides if not name.startswith("holdfast")]
    fastest = min(peers, key=lambda name: statistics.median(seconds[name]))
    for name in sides:
        ratio = statistics.median(a / b for a, b in zip(seconds[fastest], seconds[name], strict=True))
        row = [
            title,
            name,
            f"{statistics.median(seconds[name]):.1f}",
            f"{ratio:.2f}",
            f"{100 * robust[name]:.1f} %",
        ]
        print(f"| {' | '.join(row)} |", flush=True)


def pgd(count: int) -> None:
    model, (x, y) = by_pgd(), load_data("mnist").test.batch(slice(count))
    eps, step, steps = EPS, EPS / 10, 50

    def by_foolbox() -> Tensor:
        attack = foolbox.attacks.LinfPGD(abs_stepsize=step, steps=steps, random_start=True)
        bounded = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        return torch.cat(
            [attack(bounded, a, b, epsilons=eps)[1] for a, b in zip(x.split(256), y.split(256), strict=True)]
        )

    def batched(attack: Callable[[Tensor, Tensor], Tensor]) -> Side:
        return lambda: torch.cat([attack(a, b) for a, b in zip(x.split(256), y.split(256), strict=True)])

    ours = {
        precision: PGD(steps=steps, step_size=step / eps, precision=precision) for precision in ("float32", "bf16")
    }
    sides: dict[str, Side] = {
        "torchattacks": batched(torchattacks.PGD(model, eps=eps, alpha=step, steps=steps)),
        "foolbox": by_foolbox,
        "adv-lib": batched(
            lambda a, b: pgd_linf(model, a, b, ε=eps, steps=steps, absolute_step_size=step, relative_step_size=None)
        ),
        "holdfast": lambda: ours["float32"](model, x, y, Threat("linf", eps)).x_adv,
        "holdfast, bf16": lambda: ours["bf16"](model, x, y, Threat("linf", eps)).x_adv,
    }
    compare(f"PGD-50, {len(x)} images", model, y, sides, rounds=3)


def inner(count: int) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i, channels in enumerate([3, 32, 32, 64, 64, 128]):
        width = [32, 32, 64, 64, 128, 128][i]
        layers += [nn.Conv2d(channels, width, 3, 1 + i % 2, 1), nn.BatchNorm2d(width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)).train()
    x, y = load_data("cifar10", train_size=256).train.batch(slice(128))
    threat, objective = Threat("linf", 8 / 255), AdversarialTraining(steps=10)

    def by_hand(attack: Callable[[Tensor, Tensor], Tensor]) -> Side:
        def step() -> Tensor:
            model.eval()
            x_adv = attack(x, y)
            model.train()
            F.cross_entropy(model(x_adv), y).backward()
            return x_adv

        return step

    def by_holdfast() -> Tensor:
        loss = objective.loss(model, x, y, threat, Progress(0, 1))
        loss.total.backward()
        assert loss.x_adv is not None
        return loss.x_adv

    peer = torchattacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=10)
    hand = {
        "torchattacks": by_hand(peer),
        "adv-lib": by_hand(lambda a, b: pgd_linf(model, a, b, ε=8 / 255, steps=10, absolute_step_size=2 / 255)),
    }
    compare("training step with PGD-10, BatchNorm", model, y, {**hand, "holdfast": by_holdfast}, rounds=7)


def ensemble(model: nn.Module, eps: float) -> torchattacks.MultiAttack:
    options = {"norm": "Linf", "eps": eps, "seed": 0}
    return torchattacks.MultiAttack(
        [
            torchattacks.APGD(model, **options, steps=100, loss="ce"),
            torchattacks.APGDT(model, **options, steps=100, n_classes=10),
            torchattacks.FAB(model, **options, steps=100, multi_targeted=True, n_classes=10),
            torchattacks.Square(model, **options, n_queries=5000),
        ]
    )


def autoattack(count: int) -> None:
    model, (x, y) = by_pgd(), load_data("mnist").test.batch(slice(count))
    sides: dict[str, Side] = {
        "torchattacks": lambda: ensemble(model, EPS)(x, y),
        "holdfast": lambda: AutoAttack()(model, x, y, Threat("linf", EPS)).x_adv,
        "holdfast, bf16": lambda: AutoAttack(precision="bf16")(model, x, y, Threat("linf", EPS)).x_adv,
    }
    compare(f"AutoAttack, {count} images", model, y, sides, rounds=1)


def certified(count: int) -> None:
    model, (x, y) = by_ibp(), load_data("mnist").test.batch(slice(count))

    def by_holdfast() -> Tensor:
        evaluation = evaluate(model, x, y, Threat("linf", 0.1), [AutoAttack()], [BoundCertifier()], audit=0)
        print(f"  certified {evaluation.summary['certified']}, attacked {evaluation.summary['bracket']}")
        return torch.where(torch.tensor(evaluation.table["autoattack.success"])[:, None, None, None], torch.nan, x)

    sides: dict[str, Side] = {"torchattacks": lambda: ensemble(model, 0.1)(x, y), "holdfast": by_holdfast}
    compare(f"AutoAttack on an IBP network, {count} images", model, y, sides, rounds=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parts = {"pgd": pgd, "inner": inner, "autoattack": autoattack, "certified": certified}
    parser.add_argument("parts", nargs="*", default=list(parts), choices=[*parts, []])
    parser.add_argument("--images", type=int, default=500)
    arguments = parser.parse_args()
    print("| work | side | seconds | times the fastest peer's speed | robust accuracy |\n|---|---|---|---|---|")
    for part in arguments.parts:
        parts[part](arguments.images)
