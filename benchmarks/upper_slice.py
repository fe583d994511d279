"""How much robust accuracy attacks leave standing for how many forward passes: ours beside AutoAttack and others.

    HOLDFAST_DATA=... python benchmarks/upper_slice.py [--images 200] [--networks runs/upper-slice] [NAME ...]

Ten small networks on MNIST and CIFAR-10 (natural, PGD, TRADES, certified; l_inf and l_2) are trained once and
kept. Each attack is run on the first test images of each; a row is robust accuracy in per cent, forward passes for
an image that the network gets right, and process CPU seconds. ``a3`` and ``malt`` are written here from what their
papers describe: A3 (Liu et al., 2022) spends its passes on targeted starts in an order and number learnt from earlier
images; MALT (Melamed et al., 2024) orders the targets by their margin over the length of its gradient.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from holdfast import Threat
from holdfast.attacks import APGD, PGD, Attack, AutoAttack, Ladder
from holdfast.data import load_data
from holdfast.inference import predict
from holdfast.models import build
from holdfast.objectives import IBP, TRADES, AdversarialTraining, CrossEntropy
from holdfast.objectives.objective import Objective
from holdfast.training import Adam, Constant, Training, fit
from holdfast.training.engine import Engine

Made = Callable[[], Objective]

NETWORKS: dict[str, tuple[str, Threat, Threat, Made, int]] = {
    "mnist natural linf": ("mnist", Threat("linf", 0), Threat("linf", 0.08), CrossEntropy, 3),
    "mnist pgd linf": ("mnist", Threat("linf", 0.2), Threat("linf", 0.2), lambda: AdversarialTraining(steps=4), 5),
    "mnist trades linf": ("mnist", Threat("linf", 0.15), Threat("linf", 0.15), lambda: TRADES(steps=4), 5),
    "mnist ibp linf": ("mnist", Threat("linf", 0.12), Threat("linf", 0.12), IBP, 6),
    "mnist pgd l2": ("mnist", Threat("l2", 1.5), Threat("l2", 1.5), lambda: AdversarialTraining(steps=4), 5),
    "cifar10 natural linf": ("cifar10", Threat("linf", 0), Threat("linf", 1 / 255), CrossEntropy, 8),
    "cifar10 pgd linf": ("cifar10", Threat("linf", 8 / 255), Threat("linf", 8 / 255), AdversarialTraining, 8),
    "cifar10 trades linf": ("cifar10", Threat("linf", 8 / 255), Threat("linf", 8 / 255), TRADES, 8),
    "cifar10 ibp linf": ("cifar10", Threat("linf", 2 / 255), Threat("linf", 2 / 255), IBP, 8),
    "cifar10 pgd l2": ("cifar10", Threat("l2", 0.5), Threat("l2", 0.5), AdversarialTraining, 8),
}
"""Data, threat of the training and of the attacks, objective, epochs."""


def network(name: str, folder: Path) -> nn.Module:
    """The network of this name, trained where it is not kept yet."""
    data, threat, _, objective, epochs = NETWORKS[name]
    kept = folder / f"{name.replace(' ', '-')}.pt"
    shape = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}[data]
    torch.manual_seed(0)
    model = build("cnn-2layer", input_shape=shape, num_classes=10, width=2, linear_size=128)
    if kept.is_file():
        model.load_state_dict(torch.load(kept))
        return model.eval()
    train, engine = load_data(data, train_size=10_000).train, Engine(accelerator="cpu").start()
    for share, part in ((0.3, 1), (1.0, epochs - 1)):
        settings = Adam(lr=1e-3), Constant(), Training(epochs=part, batch_size=64), engine
        fit(model, train, objective(), threat.with_eps(share * threat.eps), *settings)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), kept)
    return model.eval()


def attacks() -> dict[str, Attack]:
    """By their names in the table."""
    return {
        "PGD-100": PGD(),
        "PGD-100, step .1 eps": PGD(step_size=0.1),
        "APGD-CE-100": APGD(),
        "margin, cosine, 50": PGD(loss="margin", schedule="cosine", steps=50),
        "ladder, quick": Ladder(budget="quick"),
        "ladder, standard": Ladder(budget="standard"),
        "ladder, thorough": Ladder(budget="thorough"),
        "AutoAttack": AutoAttack(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(NETWORKS))
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--networks", type=Path, default=Path("runs/upper-slice"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| network | eps | attack | standing | forwards | seconds |\n| --- | --- | --- | --- | --- | --- |")
    for name in arguments.names:
        data, _, threat, _, _ = NETWORKS[name]
        model = network(name, arguments.networks)
        x, y = load_data(data).test.batch(slice(arguments.images))
        right = (predict(model, x).argmax(1) == y).double().mean().item()
        print(f"| {name} | {threat} | none | {100 * right:.1f} | 1 | |", flush=True)
        for title, attack in attacks().items():
            started = time.process_time()
            found = attack(model, x, y, threat)
            seconds = time.process_time() - started
            spent = found.forwards[found.forwards > 1].double().mean().item()
            standing = (~found.success).double().mean().item()
            print(f"| | | {title} | {100 * standing:.1f} | {spent:.0f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
