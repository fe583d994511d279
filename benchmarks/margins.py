"""Margins of networks of several kinds by four methods, beside auto_LiRPA's: means, CPU seconds, memory.

    HOLDFAST_DATA=... PYTHONPATH=auto_LiRPA's repository python benchmarks/margins.py [NETWORK...] [--rounds 1]

Each side bounds a network in a process of its own, on one thread, and the sides take turns; what is made once for a
network (its trace, a ``BoundedModule``) is made before the clock starts, and the better of two runs counts. Memory
is what the peak of the process grows by. ``holdfast`` gives the numbers as they are computed, as the peer does;
``certified`` accounts for its own rounding, as ``bound_margins`` does by default. alpha-CROWN makes 20 steps on
either side; auto_LiRPA's optimises the last pass alone, which is its default.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.bounds import METHODS, Bounder, BoundMethod, Interval, trace
from holdfast.bounds.region import Box
from holdfast.bounds.rounding import Rounding
from holdfast.formats import read_onnx, read_vnnlib
from holdfast.inference import plain_arithmetic

PEER = {"ibp": "IBP", "crown-ibp": "CROWN-IBP", "crown": "CROWN", "alpha-crown": "CROWN-Optimized"}
SIDES = ("holdfast", "certified", "auto_LiRPA")

Case = tuple[nn.Module, Tensor, Tensor]
"""A network and the ends of a box for each of N examples, (N, ...)."""


class Block(nn.Module):
    """relu(h + f(h)) with two convolutions and BatchNorm."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        first = nn.Conv2d(before, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU()
        self.body = nn.Sequential(*first, nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width))
        self.short = nn.Conv2d(before, width, 1, stride)

    def forward(self, h: Tensor) -> Tensor:
        return torch.relu(self.body(h) + self.short(h))


def drawn(model: nn.Module, shape: tuple[int, ...], examples: int, eps: float) -> Case:
    """A network as torch draws it, around random images."""
    x = torch.rand(examples, *shape, generator=torch.Generator().manual_seed(1))
    return model.eval(), (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)


def convolutions(channels: int, size: int, width: int, classes: int, examples: int, eps: float) -> Case:
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, 1, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1)]
    layers += [nn.ReLU(), nn.Conv2d(width, 2 * width, 4, 2, 1), nn.ReLU(), nn.Flatten()]
    ends = nn.Linear(2 * width * (size // 2) ** 2, 64), nn.ReLU(), nn.Linear(64, classes)
    return drawn(nn.Sequential(*layers, *ends), (channels, size, size), examples, eps)


def pooled() -> Case:
    layers = [
        nn.Conv2d(1, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5, padding=2),
        nn.ReLU(),
    ]
    ends = nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(), nn.Linear(64, 10)
    return drawn(nn.Sequential(*layers, *ends), (1, 28, 28), 2, 0.01)


def residual() -> Case:
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), Block(8, 16, 2), Block(16, 16, 1), nn.Flatten()]
    return drawn(
        nn.Sequential(*layers, nn.Linear(1024, 100), nn.ReLU(), nn.Linear(100, 10)), (3, 32, 32), 2, 1 / 255
    )


def published(folder: str, network: str, examples: int) -> Case:
    """A network of VNN-COMP on the boxes of its first properties."""
    place = Path(os.environ["HOLDFAST_DATA"]) / "vnncomp" / folder
    found = read_onnx(place / network)
    queries = [read_vnnlib(path).queries[0] for path in sorted(place.glob("*.vnnlib.gz"))[:examples]]
    lower, upper = (
        torch.stack([getattr(query, end).float() for query in queries]).view(-1, *found.input_shape)
        for end in ("lower", "upper")
    )
    return found.module.eval(), lower, upper


CASES: dict[str, Callable[[], Case]] = {
    "MNIST fc 256×2": lambda: published("mnistfc", "mnist-net_256x2.onnx", 8),
    "MNIST fc 256×4": lambda: published("mnistfc", "mnist-net_256x4.onnx", 8),
    "oval21 base": lambda: published("oval21", "cifar_base_kw.onnx", 4),
    "residual, 32×32": residual,
    "max pool, 28×28": pooled,
    "convolutions, 28×28": lambda: convolutions(1, 28, 16, 10, 4, 0.01),
    "convolutions, 64×64": lambda: convolutions(3, 64, 8, 10, 2, 0.004),
    "200 classes, 28×28": lambda: convolutions(1, 28, 8, 200, 4, 0.01),
    "1,000 classes, 28×28": lambda: convolutions(1, 28, 8, 1000, 2, 0.01),
}


def ours(case: Case, y: Tensor, method: str, rounding: Rounding | None) -> Callable[[], Tensor]:
    model, lower, upper = case
    assert method in METHODS
    bounder = Bounder(trace(model, (lower + upper) / 2), BoundMethod.model_validate({"method": method}))

    def run() -> Tensor:
        with plain_arithmetic(lower.device), torch.no_grad():
            return bounder.margins(Box(Interval.between(lower, upper, rounding)), y)

    return run


def peer(case: Case, y: Tensor, method: str) -> Callable[[], Tensor]:
    from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm

    model, lower, upper = case
    x = (lower + upper) / 2
    bounded = BoundedModule(model, x[:1], bound_opts={"optimize_bound_args": {"iteration": 20}})
    classes = model(x[:1]).shape[1]
    one = torch.eye(classes)
    rows = (one[y][:, None] - one)[~one.bool()[y]].view(len(x), classes - 1, classes)
    ball = PerturbationLpNorm(norm=float("inf"), eps=0.0, x_L=lower, x_U=upper)

    def run() -> Tensor:
        with torch.set_grad_enabled(method == "alpha-crown"):
            given = (BoundedTensor(x, ball),)
            return bounded.compute_bounds(x=given, C=rows, method=PEER[method], bound_upper=False)[0].detach()

    return run


def one(network: str, method: str, side: str) -> dict[str, Any]:
    """What one side does, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    case = CASES[network]()
    case[0].requires_grad_(False)
    with torch.no_grad():
        y = case[0]((case[1] + case[2]) / 2).argmax(1)
    rounding = Rounding.of(torch.float32) if side == "certified" else None
    run = peer(case, y, method) if side == "auto_LiRPA" else ours(case, y, method, rounding)
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(2):
        started = time.process_time()
        margins = run()
        seconds.append(time.process_time() - started)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"mean": margins.mean().item(), "seconds": min(seconds), "megabytes": grown / 1024}


def apart(network: str, method: str, side: str) -> dict[str, Any] | None:
    """The same in a process of its own; None where it fails."""
    command = [sys.executable, __file__, network, "--one", method, side]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    if done.returncode:
        print(done.stderr.splitlines()[-1:], file=sys.stderr)
        return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def line(network: str, method: str, rounds: int) -> str:
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            if (result := apart(network, method, side)) is not None:
                found[side].append(result)

    def middle(side: str, key: str, digits: int) -> str:
        values = [result[key] for result in found[side]]
        return f"{statistics.median(values):,.{digits}f}" if values else "fails"

    columns = [middle(side, "mean", 4) for side in ("holdfast", "auto_LiRPA")]
    columns += [middle(side, "seconds", 3) for side in SIDES] + [middle(side, "megabytes", 0) for side in SIDES]
    return f"| {network} | {method} | {' | '.join(columns)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(CASES))
    parser.add_argument("--methods", default=",".join(PEER))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "SIDE"))
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.networks[0], *given.one)))
        return
    titles = [f"{side}, {unit}" for unit in ("s", "MB") for side in SIDES]
    print(f"| network | method | mean | auto_LiRPA | {' | '.join(titles)} |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for network in given.networks:
        for method in given.methods.split(","):
            print(line(network, method, given.rounds), flush=True)


if __name__ == "__main__":
    main()
