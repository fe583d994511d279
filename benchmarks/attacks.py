"""Attacks against their peers, both sides in turns in one process: CPU seconds, passes, and what is left standing.

    pip install ... (see attacks-requirements.txt)
    HOLDFAST_DATA=... python benchmarks/attacks.py [PART ...] [--rounds 3] [--images N] [--networks FOLDER]

Four networks, in l_inf: MNIST natural (most falls), TRADES (about 80 % stand) and IBP, kept by ``upper_slice.py``;
a PreActResNet-18 with BatchNorm, barely trained on CIFAR-10. Only images that the network gets right; one thread.

pgd: PGD-50 against torchattacks, foolbox, adv-lib and a bare loop. step: a training step with PGD-3 and PGD-10
against a hand-written one. autoattack: the original's passes against the official AutoAttack, and the default
attack at its three budgets. certified: an evaluation with AutoAttack, certificates and audit on the IBP network
against the official AutoAttack. parts: FAB-T and Square against the official ones and torchattacks'.

Ratios are the fastest peer's seconds over a side's, medians over rounds and their range. How many images fall to
one side only is printed on standard error.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import types
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from upper_slice import network

from holdfast import Threat, evaluate
from holdfast.attacks import FAB, PGD, Attack, AutoAttack, Ladder, Square
from holdfast.certify import BoundCertifier
from holdfast.data import load_data
from holdfast.inference import predict
from holdfast.models import build
from holdfast.objectives import AdversarialTraining, CrossEntropy
from holdfast.objectives.objective import Progress
from holdfast.search import per_example
from holdfast.training import Adam, Constant, Training, fit
from holdfast.training.engine import Engine

for unused in ("torchvision", "visdom"):  # adv-lib imports them for what is not used here
    sys.modules[unused] = types.ModuleType(unused)
sys.modules["torchvision"].models = types.ModuleType("torchvision.models")  # type: ignore[attr-defined]

import autoattack as official  # noqa: E402
import foolbox  # noqa: E402
import torchattacks  # noqa: E402
from adv_lib.attacks import pgd_linf  # noqa: E402
from autoattack.fab_pt import FABAttack_PT  # noqa: E402
from autoattack.square import SquareAttack  # noqa: E402

del sys.modules["torchvision"], sys.modules["visdom"]

BATCH = 256
QUERIES = 2000
"""Of Square where it is alone."""


class Case(NamedTuple):
    """A network, images that it gets right, and what they are attacked with."""

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    threat: Threat


class Outcome(NamedTuple):
    """What a side made of N images."""

    found: Tensor
    """The adversarial images, (N, ...), or which images stand, (N,) bool."""
    forwards: int
    """Forward passes of an image, of all images together."""


Side = Callable[[int], Outcome]
"""Attacks with a seed."""
Batched = Callable[[Tensor, Tensor], Tensor]
"""(images (n, ...), labels (n,)) → adversarial images (n, ...)."""
Maker = Callable[[nn.Module, Threat, int], Batched]
"""A peer's attack on a model, with a threat and a seed."""


class Counted(nn.Module):
    """A model that counts the images it is asked about."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.images = model, 0

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        return self.model(x)


def right(model: nn.Module, data: str, count: int) -> tuple[Tensor, Tensor]:
    """The first so many of 400 test images that the network gets right, and their labels."""
    x, y = load_data(data).test.batch(slice(400))
    rows = (predict(model, x).argmax(1) == y).nonzero().squeeze(1)[:count]
    return x[rows], y[rows]


def kept(name: str, eps: float, count: int, folder: Path) -> Case:
    """One of the networks on MNIST."""
    model = network(f"mnist {name} linf", folder).requires_grad_(False)
    return Case(f"{name}, eps {eps}", model, *right(model, "mnist", count), Threat("linf", eps))


def resnet(count: int) -> Case:
    """PreActResNet-18 of width 8 after 1,000 images of CIFAR-10, at an eps at which most stands."""
    torch.manual_seed(0)
    model = build("preact-resnet18", input_shape=(3, 32, 32), num_classes=10, width=8)
    train, engine = load_data("cifar10", train_size=1000).train, Engine(accelerator="cpu").start()
    settings = Adam(lr=2e-3), Constant(), Training(epochs=1, batch_size=64), engine
    fit(model, train, CrossEntropy(), Threat("linf", 0), *settings)
    model.eval().requires_grad_(False)
    return Case("ResNet, eps 0.25/255", model, *right(model, "cifar10", count), Threat("linf", 0.25 / 255))


def peer(case: Case, make: Maker) -> Side:
    """A peer's attack, batch by batch."""

    def side(seed: int) -> Outcome:
        torch.manual_seed(seed)
        counted = Counted(case.model).eval()
        attack = make(counted, case.threat, seed)
        pieces = zip(case.x.split(BATCH), case.y.split(BATCH), strict=True)
        return Outcome(torch.cat([attack(x, y) for x, y in pieces]), counted.images)

    return side


def ours(case: Case, attack: Attack) -> Side:
    def side(seed: int) -> Outcome:
        result = attack(case.model, case.x, case.y, case.threat, seed=seed, batch_size=BATCH)
        found = torch.where(per_example(result.success, case.x), result.x_adv, case.x)
        return Outcome(found, int(result.forwards.sum()))

    return side


def standing(case: Case, found: Tensor) -> Tensor:
    """Which images the network still gets right, (N,) bool."""
    if found.dim() == 1:
        return found
    assert (case.threat.distance(case.x, found) <= case.threat.eps * (1 + 1e-4)).all()
    return predict(case.model, found).argmax(1) == case.y


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} – {max(ratios):.2f})"


def compare(work: str, case: Case, peers: dict[str, Side], sides: dict[str, Side], rounds: int) -> None:
    """Run all in turns and print a row for each."""
    every, images = {**peers, **sides}, len(case.y)
    seconds: dict[str, list[float]] = {name: [] for name in every}
    stands: dict[str, list[Tensor]] = {name: [] for name in every}
    forwards = dict.fromkeys(every, 0)
    for seed in range(rounds):
        for name, side in every.items():
            started = time.process_time()
            outcome = side(seed)
            seconds[name].append(time.process_time() - started)
            stands[name].append(standing(case, outcome.found))
            forwards[name] += outcome.forwards
    fastest = min(peers, key=lambda name: statistics.median(seconds[name]))
    reference = torch.stack(stands[fastest])
    for name in every:
        ratio = spread([a / b for a, b in zip(seconds[fastest], seconds[name], strict=True)])
        stand = torch.stack(stands[name])
        row = [
            f"{work}, {case.name}, {images} images",
            name,
            f"{statistics.median(seconds[name]):.2f}",
            ratio,
            f"{100 * stand.double().mean().item():.1f} %",
            f"{forwards[name] / rounds / images:.0f}",
        ]
        print(f"| {' | '.join(row)} |", flush=True)
        only = int((stand & ~reference).sum()), int((~stand & reference).sum())
        print(f"  {name}: {only[0]} fall to {fastest} only, {only[1]} to it only", file=sys.stderr, flush=True)


def by_torchattacks(model: nn.Module, threat: Threat, seed: int) -> Batched:
    return torchattacks.PGD(model, eps=threat.eps, alpha=threat.eps / 10, steps=50)


def by_foolbox(model: nn.Module, threat: Threat, seed: int) -> Batched:
    attack = foolbox.attacks.LinfPGD(abs_stepsize=threat.eps / 10, steps=50, random_start=True)
    bounded = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    return lambda x, y: attack(bounded, x, y, epsilons=threat.eps)[1]


def by_adv_lib(model: nn.Module, threat: Threat, seed: int) -> Batched:
    options = {"ε": threat.eps, "steps": 50, "absolute_step_size": threat.eps / 10, "relative_step_size": None}
    return lambda x, y: pgd_linf(model, x, y, **options)


def by_hand(steps: int, step_size: float) -> Maker:
    """The last point of PGD on the cross-entropy in l_inf, as one would write it."""

    def attack(model: nn.Module, threat: Threat, x: Tensor, y: Tensor) -> Tensor:
        low, high = (x - threat.eps).clamp(min=0), (x + threat.eps).clamp(max=1)
        points = torch.clamp(x + threat.eps * (2 * torch.rand_like(x) - 1), low, high)
        for _ in range(steps):
            points.requires_grad_(True)
            (slope,) = torch.autograd.grad(F.cross_entropy(model(points), y), points)
            points = torch.clamp(points.detach() + step_size * threat.eps * slope.sign(), low, high)
        return points

    return lambda model, threat, seed: lambda x, y: attack(model, threat, x, y)


def pgd(arguments: argparse.Namespace) -> None:
    count, folder = arguments.images, arguments.networks
    cases = (
        kept("natural", 0.1, count or 100, folder),
        kept("trades", 0.15, count or 100, folder),
        resnet(count or 16),
    )
    makers = {
        "torchattacks": by_torchattacks,
        "foolbox": by_foolbox,
        "adv-lib": by_adv_lib,
        "bare loop": by_hand(50, 0.1),
    }
    for case in cases:
        sides = {
            "holdfast": ours(case, PGD(steps=50, step_size=0.1)),
            "holdfast, bf16": ours(case, PGD(steps=50, step_size=0.1, precision="bf16")),
        }
        compare(
            "PGD-50", case, {name: peer(case, maker) for name, maker in makers.items()}, sides, arguments.rounds
        )


def step(arguments: argparse.Namespace) -> None:
    case = resnet(arguments.images or 32)
    case = case._replace(name="ResNet, eps 8/255", threat=Threat("linf", 8 / 255))
    for steps in (3, 10):
        attack, objective = by_hand(steps, 0.25), AdversarialTraining(steps=steps, step_size=0.25)
        forwards = (steps + 1) * len(case.y)
        hand, own = (deepcopy(case.model).requires_grad_(True) for _ in range(2))

        def by_loop(
            seed: int, attack: Maker = attack, model: nn.Module = hand, forwards: int = forwards
        ) -> Outcome:
            model.zero_grad()
            x_adv = attack(model.eval(), case.threat, seed)(case.x, case.y)
            F.cross_entropy(model.train()(x_adv), case.y).backward()
            return Outcome(x_adv, forwards)

        def by_holdfast(
            seed: int,
            objective: AdversarialTraining = objective,
            model: nn.Module = own,
            forwards: int = forwards,
        ) -> Outcome:
            model.zero_grad()
            loss = objective.loss(model.train(), case.x, case.y, case.threat, Progress(seed, 100))
            loss.total.backward()
            assert loss.x_adv is not None
            return Outcome(loss.x_adv, forwards)

        by_loop(0), by_holdfast(0)  # the first step of a training traces the network
        compare(
            f"step with PGD-{steps}", case, {"by hand": by_loop}, {"holdfast": by_holdfast}, 3 * arguments.rounds
        )


def by_original(model: nn.Module, threat: Threat, seed: int) -> Batched:
    return official.AutoAttack(
        model, norm="Linf", eps=threat.eps, seed=seed, verbose=False, device="cpu"
    ).run_standard_evaluation


def autoattack(arguments: argparse.Namespace) -> None:
    count, folder = arguments.images, arguments.networks
    for case in (kept("trades", 0.15, count or 40, folder), kept("natural", 0.1, count or 40, folder)):
        sides = {"holdfast, original's passes": ours(case, AutoAttack(reference=True))}
        sides |= {f"ladder, {budget}": ours(case, Ladder(budget=budget)) for budget in BUDGETS}
        compare("AutoAttack", case, {"official": peer(case, by_original)}, sides, arguments.rounds)


BUDGETS = ("quick", "standard", "thorough")


def certified(arguments: argparse.Namespace) -> None:
    case = kept("ibp", 0.1, arguments.images or 100, arguments.networks)

    def by_holdfast(seed: int) -> Outcome:
        certifier = BoundCertifier(method="crown-ibp")
        evaluation = evaluate(case.model, case.x, case.y, case.threat, [AutoAttack()], [certifier], seed=seed)
        summary = evaluation.summary
        print(f"  {summary['counts']}, audit {summary['audit']}, {summary['timings']}", file=sys.stderr)
        stands = torch.from_numpy(~evaluation.table["autoattack.success"].to_numpy(dtype=bool))
        passes = summary["passes"]["autoattack"]["forwards"] + summary["audit"]["passes"]
        return Outcome(stands, passes + 2 * len(case.y))

    peers, sides = {"official": peer(case, by_original)}, {"holdfast, certificates and audit": by_holdfast}
    compare("AutoAttack", case, peers, sides, arguments.rounds)


def parts(arguments: argparse.Namespace) -> None:
    case = kept("trades", 0.15, arguments.images or 40, arguments.networks)
    options = {"norm": "Linf", "eps": case.threat.eps}

    def fab(model: nn.Module, threat: Threat, seed: int) -> Batched:
        return FABAttack_PT(model, **options, targeted=True, n_target_classes=9, seed=seed, device="cpu").perturb

    def fab_of_torchattacks(model: nn.Module, threat: Threat, seed: int) -> Batched:
        return torchattacks.FAB(model, **options, steps=100, multi_targeted=True, n_classes=10, seed=seed)

    def square(model: nn.Module, threat: Threat, seed: int) -> Batched:
        return SquareAttack(model, **options, p_init=0.8, n_queries=QUERIES, seed=seed, device="cpu").perturb

    def square_of_torchattacks(model: nn.Module, threat: Threat, seed: int) -> Batched:
        return torchattacks.Square(model, **options, n_queries=QUERIES, seed=seed)

    for work, attack, original, of_torchattacks in (
        ("FAB-T", FAB(within_eps=True), fab, fab_of_torchattacks),
        (f"Square, {QUERIES} queries", Square(queries=QUERIES), square, square_of_torchattacks),
    ):
        peers = {"official": peer(case, original), "torchattacks": peer(case, of_torchattacks)}
        compare(work, case, peers, {"holdfast": ours(case, attack)}, arguments.rounds)


PARTS = {"pgd": pgd, "step": step, "autoattack": autoattack, "certified": certified, "parts": parts}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), choices=[*PARTS, []])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, help="of each network; by default few where an attack is long")
    parser.add_argument("--networks", type=Path, default=Path("runs/upper-slice"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| work | side | CPU seconds | speed | standing | forwards an image |\n|" + " --- |" * 6)
    for part in arguments.parts:
        PARTS[part](arguments)
