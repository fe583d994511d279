"""Robust accuracies and median distances of the peers at given budgets, on three small trained networks.

    HOLDFAST_DATA=... python benchmarks/attack_agreement.py tests/reference/attack_peers.npz

Trains the networks, runs the peers (see attacks-requirements.txt) and stores weights, threats, the peers' counts
(means over ``SEEDS`` where an attack draws) and median distances; ``tests/attacks/test_peers.py`` holds ours to
them. What the file holds already is kept, networks too. Prints our median distances beside those of adv-lib.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from holdfast import Threat
from holdfast.attacks import DDN, FMN, Attack, SigmaZero
from holdfast.data import load_data
from holdfast.models import build
from holdfast.objectives import AdversarialTraining
from holdfast.training import Adam, Constant, Training, fit
from holdfast.training.engine import Engine

for unused in ("torchvision", "visdom"):  # adv-lib imports them for what is not used here
    sys.modules[unused] = types.ModuleType(unused)
sys.modules["torchvision"].models = types.ModuleType("torchvision.models")  # type: ignore[attr-defined]

from adv_lib.attacks import ddn, fmn, sigma_zero  # noqa: E402

del sys.modules["torchvision"], sys.modules["visdom"]

IMAGES, SEEDS, STEPS = 200, 5, 100
ORDERS = {"linf": float("inf"), "l2": 2, "l1": 1, "l0": 0}
BUDGET = ("pgd", "apgd", "apgd-dlr", "apgd-t", "fab", "square")


def stored_networks(stored: dict[str, np.ndarray]) -> Iterator[tuple[str, str, str, nn.Module, Threat]]:
    """Name, data, architecture, network and threat of an earlier run."""
    for name in sorted({key.split("/")[0] for key in stored}):
        data, architecture, text = map(str, stored[f"{name}/setting"])
        model = build(architecture, input_shape=load_data(data).test.shape, num_classes=10, width=2, linear_size=32)
        start = f"{name}/weights/"
        state = {
            k.removeprefix(start): torch.from_numpy(v).float() for k, v in stored.items() if k.startswith(start)
        }
        model.load_state_dict(state)
        yield name, data, architecture, model.eval().requires_grad_(False), Threat.parse(text)


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
    import torchattacks

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


def nearest_attacks(
    model: nn.Module, x: Tensor, y: Tensor
) -> Iterator[tuple[str, str, Callable[[], Tensor], Attack]]:
    """Name, norm, the peer's and ours of the attacks that look for the nearest adversarial example."""
    for norm, order in ORDERS.items():
        yield "fmn", norm, partial(fmn, model, x, y, norm=order, steps=STEPS), FMN(steps=STEPS)
    yield "ddn", "l2", partial(ddn, model, x, y, steps=STEPS), DDN(steps=STEPS)
    yield "sigma-zero", "l0", partial(sigma_zero, model, x, y, num_steps=STEPS), SigmaZero(steps=STEPS)


def main(path: Path) -> None:
    stored: dict[str, np.ndarray] = dict(np.load(path)) if path.exists() else {}
    for name, data, architecture, model, threat in stored_networks(stored) if stored else networks():
        x, y = load_data(data).test.batch(slice(IMAGES))
        for key, value in model.state_dict().items():
            stored[f"{name}/weights/{key}"] = value.half().numpy()
        stored[f"{name}/setting"] = np.array([data, architecture, str(threat)])
        right = model(x).argmax(1) == y
        print(name, "standard", int(right.sum()))
        for attack_name in BUDGET:
            if f"{name}/robust/{attack_name}" in stored:
                continue
            seeds = range(1 if attack_name in ("apgd-t", "fab") else SEEDS)
            runs = [budget_attacks(model, threat, seed)[attack_name](x, y) for seed in seeds]
            robust = float(np.mean([int((model(x_adv).argmax(1) == y).sum()) for x_adv in runs]))
            stored[f"{name}/robust/{attack_name}"] = np.array(robust)
            print(name, attack_name, robust, flush=True)
        for attack_name, norm, peer, ours in nearest_attacks(model, x, y):
            space = threat if norm == threat.norm else Threat(norm, 1.0)
            key = f"{attack_name}-{norm}"
            if f"{name}/median/{key}" not in stored:
                x_adv = peer()
                found = (model(x_adv).argmax(1) != y) & right
                distance = torch.where(found, space.distance(x, x_adv), torch.where(right, torch.inf, 0.0))
                stored[f"{name}/median/{key}"] = np.array(float(distance[right].median()))
                if space is threat:
                    stored[f"{name}/robust/{key}"] = np.array(int((distance > threat.eps).sum()))
            own = ours(model, x, y, space).distance[right].median().item()
            print(name, key, "adv-lib", float(stored[f"{name}/median/{key}"]), "holdfast", own, flush=True)
    np.savez_compressed(path, **stored)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
