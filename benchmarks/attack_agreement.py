"""Robust accuracy of each attack beside its peer's at the same budget, on three small trained networks.

    HOLDFAST_DATA=... python benchmarks/attack_agreement.py tests/reference/attack_peers.npz

Trains the networks, runs the peers (see attacks-requirements.txt) and stores weights, threats and the peers'
counts, means over ``SEEDS`` where an attack draws; ``tests/attacks/test_peers.py`` holds ours against them.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from holdfast import Threat
from holdfast.data import load_data
from holdfast.models import build
from holdfast.objectives import AdversarialTraining
from holdfast.training import Adam, Constant, Training, fit
from holdfast.training.engine import Engine

for unused in ("torchvision", "visdom"):  # adv-lib imports them for what is not used here
    sys.modules[unused] = types.ModuleType(unused)
sys.modules["torchvision"].models = types.ModuleType("torchvision.models")  # type: ignore[attr-defined]

import torchattacks  # noqa: E402
from adv_lib.attacks import ddn, fmn  # noqa: E402

del sys.modules["torchvision"], sys.modules["visdom"]

IMAGES, SEEDS = 200, 5


def networks() -> Iterator[tuple[str, str, str, nn.Module, Threat]]:
    """Name, data, architecture, trained network, threat."""
    engine = Engine(accelerator="cpu").start()
    for name, data, threat, epochs in (
        ("mnist-linf", "mnist", Threat("linf", 0.15), 6),
        ("mnist-l2", "mnist", Threat("l2", 1.5), 6),
        ("cifar10-linf", "cifar10", Threat("linf", 2 / 255), 12),
    ):
        splits = load_data(data, train_size=8_000)
        shape = splits.train.shape
        torch.manual_seed(0)
        model = build("cnn-2layer", input_shape=shape, num_classes=10, width=2, linear_size=32)
        for share, part in ((0.3, 1), (1.0, epochs)):
            settings = Adam(lr=2e-3), Constant(), Training(epochs=part, batch_size=64), engine
            objective = AdversarialTraining(steps=4, step_size=0.4)
            fit(model, splits.train, objective, threat.with_eps(share * threat.eps), *settings)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.half().float())
        yield name, data, "cnn-2layer", model.eval().requires_grad_(False), threat


def budget_attacks(model: nn.Module, threat: Threat, seed: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    torch.manual_seed(seed)
    options = {"norm": {"linf": "Linf", "l2": "L2"}[threat.norm], "eps": threat.eps, "seed": seed}
    step, pgd = threat.eps / 8, {"linf": torchattacks.PGD, "l2": torchattacks.PGDL2}[threat.norm]
    return {
        "pgd": pgd(model, eps=threat.eps, alpha=step, steps=40),
        "apgd": torchattacks.APGD(model, **options, steps=50, loss="ce"),
        "apgd-dlr": torchattacks.APGD(model, **options, steps=50, loss="dlr"),
        "apgd-t": torchattacks.APGDT(model, **options, steps=20, n_classes=10),
        "fab": torchattacks.FAB(model, **options, steps=20, multi_targeted=True, n_classes=10),
        "square": torchattacks.Square(model, **options, n_queries=500),
    }


def main(path: str) -> None:
    stored: dict[str, np.ndarray] = {}
    for name, data, architecture, model, threat in networks():
        x, y = load_data(data).test.batch(slice(IMAGES))
        for key, value in model.state_dict().items():
            stored[f"{name}/weights/{key}"] = value.half().numpy()
        stored[f"{name}/setting"] = np.array([data, architecture, str(threat)])
        right = model(x).argmax(1) == y
        print(name, "standard", int(right.sum()))
        for attack_name in budget_attacks(model, threat, 0):
            seeds = range(1 if attack_name in ("apgd-t", "fab") else SEEDS)
            runs = [budget_attacks(model, threat, seed)[attack_name](x, y) for seed in seeds]
            robust = float(np.mean([int((model(x_adv).argmax(1) == y).sum()) for x_adv in runs]))
            stored[f"{name}/robust/{attack_name}"] = np.array(robust)
            print(name, attack_name, robust, flush=True)
        order = {"linf": float("inf"), "l2": 2}[threat.norm]
        nearest: dict[str, Callable[[], Tensor]] = {"fmn": lambda: fmn(model, x, y, norm=order, steps=100)}  # noqa: B023
        if threat.norm == "l2":
            nearest["ddn"] = lambda: ddn(model, x, y, steps=100)  # noqa: B023
        for attack_name, run in nearest.items():
            x_adv = run()
            wrong = (model(x_adv).argmax(1) != y) | ~right
            distance = torch.where(right, threat.distance(x, x_adv), 0.0)
            robust = int((~wrong | (distance > threat.eps)).sum())
            stored[f"{name}/robust/{attack_name}"] = np.array(robust)
            stored[f"{name}/median/{attack_name}"] = np.array(float(distance[right].median()))
            print(name, attack_name, robust, float(distance[right].median()), flush=True)
    np.savez_compressed(path, **stored)


if __name__ == "__main__":
    main(sys.argv[1])
