"""How much robust accuracy attacks leave standing for how many forward passes: ours beside AutoAttack and others.

    HOLDFAST_DATA=... python benchmarks/upper_slice.py [--images 200] [--networks runs/upper-slice] [NAME ...]

Ten small networks on MNIST and CIFAR-10 (natural, PGD, TRADES, certified; l_inf and l_2) are trained once and
kept. Each attack is run on the first test images of each; a row is robust accuracy in per cent, forward passes for
an image that the network gets right, and process CPU seconds. ``a3`` and ``malt`` are written here from what their
papers describe: A3 (Liu et al., 2022) spends its passes on targeted starts in an order and number learnt from
earlier images; MALT (Melamed et al., 2024) orders the targets by their margin over the length of its gradient.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

from holdfast import Threat
from holdfast.attacks import APGD, PGD, APGDTargeted, Attack, AutoAttack, Ladder
from holdfast.attacks.attack import Targets
from holdfast.attacks.losses import gap, targeted_gap, until_wrong
from holdfast.attacks.pgd import random_start
from holdfast.data import load_data
from holdfast.inference import predict
from holdfast.models import build
from holdfast.objectives import IBP, TRADES, AdversarialTraining, CrossEntropy
from holdfast.objectives.objective import Objective
from holdfast.search import Ascent, Steepest, ascend, climb, gradient_of
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


class Malt(Attack, name="malt"):
    """APGD-T on targets by their margin over the length of its gradient at the input (after Melamed et al.,
    2024)."""

    targets: int = 9
    steps: int = 100

    def perturb(self, model: nn.Module, targets: Targets, threat: Threat) -> Ascent:
        points = targets.x.clone().requires_grad_(True)
        logits = model(points)
        nearness = torch.full_like(targets.logits, -torch.inf)
        for target in range(logits.shape[1]):
            gap = targeted_gap(logits, targets.y, torch.full_like(targets.y, target))
            slope = threat.dual_length(gradient_of(gap, points, keep=True))
            nearness[:, target] = gap.detach() / slope.clamp(min=1e-12)
        attack = APGDTargeted(targets=self.targets, steps=self.steps)
        found = attack.perturb(model, targets._replace(logits=nearness), threat)
        found.forwards.add_(1)
        found.backwards.add_(logits.shape[1])
        return found


class A3(Attack, name="a3"):
    """Restarts of PGD on the margin with falling steps, from starts along the direction in the space of logits that
    broke others, on ever fewer of the images: those whose margin is the least (after Liu et al., 2022)."""

    restarts: int = 10
    steps: int = 25

    def perturb(self, model: nn.Module, targets: Targets, threat: Threat) -> Ascent:
        result = Ascent.before(targets.x)
        attack = PGD(loss="margin", schedule="cosine", steps=self.steps)
        way = torch.zeros_like(targets.logits[0])
        for restart in range(self.restarts):
            rows = result.unfinished
            share = 1 - 0.9 * restart / self.restarts
            rows = rows[result.value[rows].argsort(descending=True)[: max(1, int(share * len(rows)))]]
            if not len(rows):
                break
            part = targets.take(rows)
            start = random_start(part, threat, restart)(torch.arange(len(rows)), restart)
            drawn = 2 * torch.rand(len(rows), len(way), generator=torch.Generator().manual_seed(restart)) - 1
            direction = drawn + way
            points = climb(
                lambda x, chosen, d=direction: ((model(x) * d[chosen]).sum(1), None),
                part.x,
                threat,
                steps=2,
                step_size=threat.eps,
                start=start,
            )
            function = until_wrong(model, part.y, gap)
            rule = Steepest(threat, threat.eps, decay=attack._decay)
            found = ascend(function, part.x, rule, steps=self.steps, start=lambda chosen, _, p=points: p[chosen])
            found.forwards.add_(2)
            found.backwards.add_(2)
            if found.finished.any():
                changed = model(found.x[found.finished]) - part.logits[found.finished]
                way = changed.detach().sign().mean(0)
            result.absorb(rows, found, restart)
        return result


def attacks() -> dict[str, Attack]:
    """By their names in the table."""
    return {
        "PGD-100": PGD(),
        "PGD-100, step .1 eps": PGD(step_size=0.1),
        "APGD-CE-100": APGD(),
        "A3-like, 4 × 25": A3(restarts=4),
        "A3-like, 10 × 50": A3(steps=50),
        "MALT-like, 3 × 33": Malt(targets=3, steps=33),
        "MALT-like, 9 × 100": Malt(),
        "ladder, quick": Ladder(budget="quick"),
        "ladder, standard": Ladder(budget="standard"),
        "ladder, thorough": Ladder(budget="thorough"),
        "AutoAttack": AutoAttack(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(NETWORKS))
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--networks", type=Path, default=Path("runs/upper-slice"))
    parser.add_argument("--figure", type=Path, help="where the curve is drawn")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in arguments.names:
        data, _, threat, _, _ = NETWORKS[name]
        model = network(name, arguments.networks).requires_grad_(False)
        x, y = load_data(data).test.batch(slice(arguments.images))
        right = (predict(model, x).argmax(1) == y).double().mean().item()
        for title, attack in attacks().items():
            started = time.process_time()
            found = attack(model, x, y, threat)
            seconds = time.process_time() - started
            spent = found.forwards[found.forwards > 1].double().mean().item()
            standing = (~found.success).double().mean().item()
            rows.append(
                {
                    "network": name,
                    "threat": str(threat),
                    "standard": 100 * right,
                    "attack": title,
                    "standing": 100 * standing,
                    "forwards": spent,
                    "seconds": seconds,
                }
            )
            print(" | ".join(f"{v:.1f}" if isinstance(v, float) else v for v in rows[-1].values()), flush=True)
    table = pd.DataFrame(rows)
    report(table)
    if arguments.figure is not None:
        draw(table, arguments.figure)


def report(table: pd.DataFrame) -> None:
    """What stands of each network, and how far above AutoAttack that is."""
    names = list(dict.fromkeys(table["attack"]))
    standing = table.pivot(index="network", columns="attack", values="standing")[names]
    standing = standing.loc[list(dict.fromkeys(table["network"]))]
    excess = standing.sub(standing["AutoAttack"], axis=0)
    mean = table.groupby("attack")[["forwards", "seconds"]].mean().loc[names].T
    whole = pd.concat(
        [standing, excess.mean().to_frame("mean excess").T, excess.max().to_frame("largest excess").T]
    )
    whole = pd.concat([whole, mean.rename({"forwards": "mean forwards", "seconds": "mean CPU seconds"})])
    print("| | " + " | ".join(names) + " |\n|" + " --- |" * (len(names) + 1))
    for label, row in whole.iterrows():
        print(f"| {label} | " + " | ".join(f"{value:.1f}" for value in row) + " |")


def draw(table: pd.DataFrame, path: Path) -> None:
    """Mean robust accuracy against mean forwards."""
    mean = table.groupby("attack", sort=False)[["forwards", "standing"]].mean()
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for title, row in mean.iterrows():
        ours = str(title).startswith("ladder")
        axes.plot(row["forwards"], row["standing"], "o" if ours else "s", color="C0" if ours else "0.5")
        axes.annotate(
            str(title), (row["forwards"], row["standing"]), (4, 4), textcoords="offset points", fontsize=7
        )
    axes.set(xscale="log", xlabel="forward passes for an image that is right", ylabel="robust accuracy, %")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
