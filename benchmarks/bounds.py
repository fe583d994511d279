"""Steps of certified training and full CROWN as multiples of a plain training step on the same network, in one run.

    HOLDFAST_DATA=... python benchmarks/bounds.py

A network of four convolutions (16, 16, 32, 32; two of stride 2) and two dense layers on MNIST, batch 128, one
thread, Adam's step included. The kinds of steps take turns; ratios are medians over rounds. CROWN bounds the
margins of 16 images on the network after a short training by IBP. Where auto_LiRPA can be imported, its bounds run
beside ours; margins on many networks beside its, with seconds and memory, are in ``margins.py``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast import Threat
from holdfast.bounds import bound_margins
from holdfast.data import load_data
from holdfast.objectives import BCP, CROWNIBP, IBP, Objective, OneStepRelaxation, Progress
from holdfast.training import Adam, OneCycle, Training, fit
from holdfast.training.engine import Engine

try:
    from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm
except Exception as fault:  # it pins an old torch
    BoundedModule, MISSING = None, str(fault).splitlines()[0]

ROUNDS = 9
THREAT = Threat("linf", 0.05)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 4, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 49, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def step_with(loss: Callable[[nn.Module, Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Callable[[], None]:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss(model, x, y).backward()
        optimizer.step()

    return step


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def of(objective: Objective, threat: Threat = THREAT) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    return lambda model, x, y: objective.loss(model, x, y, threat, Progress.end()).total


def peer_step(method: str, x: Tensor, y: Tensor) -> Callable[[], None]:
    model = network()
    bounded = BoundedModule(model, x[:1])
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    rows = torch.eye(10)[y][:, None] - torch.eye(10)[None]
    keep = ~torch.eye(10, dtype=torch.bool)[y]
    rows = rows[keep].view(len(x), 9, 10)

    def step() -> None:
        optimizer.zero_grad()
        ball = PerturbationLpNorm(norm=float("inf"), eps=THREAT.eps)
        lower, _ = bounded.compute_bounds(x=(BoundedTensor(x, ball),), C=rows, method=method, bound_upper=False)
        F.softplus(torch.logsumexp(-lower, 1)).mean().backward()
        optimizer.step()

    return step


def compare(title: str, sides: dict[str, Callable[[], None]], rounds: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        run()
    for _ in range(rounds):
        for name, run in sides.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    base = next(iter(seconds.values()))
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, base, strict=True))
        print(f"| {title} | {name} | {1000 * statistics.median(times):.0f} | {ratio:.2f} |", flush=True)


def trained() -> nn.Module:
    images = load_data("mnist", train_size=20_000).train
    model, engine = network(), Engine(accelerator="cpu").start()
    objective = IBP(kappa=0.5, ramp_end=0.6, initialisation="shi")
    fit(
        model,
        images,
        objective,
        THREAT,
        Adam(lr=1e-3),
        OneCycle(),
        Training(epochs=3, batch_size=128),
        engine,
    )
    return model.eval().requires_grad_(False)


def main() -> None:
    torch.set_num_threads(1)
    x, y = load_data("mnist", train_size=2_000).train.batch(slice(128))
    print("| work | step | ms | times a plain step |\n|---|---|---|---|")
    sides = {
        "plain": step_with(plain, x, y),
        "IBP": step_with(of(IBP(kappa=0.0)), x, y),
        "CROWN-IBP, fused": step_with(of(CROWNIBP(beta=1.0, fused=True)), x, y),
        "CROWN-IBP, nine margins": step_with(of(CROWNIBP(beta=1.0, fused=False)), x, y),
        "one-step relaxation, fused": step_with(of(OneStepRelaxation(fused=True)), x, y),
        "one-step relaxation, nine margins": step_with(of(OneStepRelaxation(fused=False)), x, y),
        "BCP": step_with(of(BCP(), Threat("l2", 1.0)), x, y),
    }
    if BoundedModule is not None:
        sides |= {f"auto_LiRPA {name}": peer_step(name, x, y) for name in ("IBP", "CROWN-IBP")}
    compare("training step, batch 128", sides, ROUNDS)

    model = trained()
    x, y = load_data("mnist").test.batch(slice(16))
    margins: dict[str, Tensor] = {}

    def bounding(method: str) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                margins[method] = bound_margins(model, x, y, THREAT, method)

        return run

    sides = {"plain": step_with(plain, x, y)} | {name: bounding(name) for name in ("ibp", "crown-ibp", "crown")}
    compare("margins of 16 images", sides, 3)
    for name, found in margins.items():
        print(f"  {name}: {int((found > 0).all(1).sum())} of 16 verified, mean margin {found.mean():.3f}")
    if BoundedModule is None:
        print(f"  auto_LiRPA is not here: {MISSING}")


if __name__ == "__main__":
    main()
