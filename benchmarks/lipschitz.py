"""A training step and an evaluation of each 1-Lipschitz layer as multiples of the plain layer's, peers beside it.

    python benchmarks/lipschitz.py

Convolutions 3 × 3 of 64 channels on 128 images of 16 × 16, dense layers of 512 features on 256 inputs; one thread.
A training step is forward, backward to weights and input, and an SGD step; an evaluation is a forward without
gradient of unchanged weights, against the plain layer, and for "frozen" that of the plain layer made of it. All
layers take turns in every round; ratios are medians over rounds of the time against the plain layer's of the same
round. Peers (deel-torchlip, orthogonium) run where they are installed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from holdfast import layers


def of(kind: type[nn.Module]) -> Callable[[int], nn.Module]:
    return lambda width: kind(width, width)


CONVOLUTIONS: dict[str, Callable[[int], nn.Module]] = {
    "plain": lambda c: nn.Conv2d(c, c, 3, padding=1),
    **{
        name: of(getattr(layers, f"{name}Conv2d"))
        for name in ("AOL", "CPL", "SLL", "SOC", "BCOP", "Cayley", "LOT", "Sandwich")
    },
}
DENSE: dict[str, Callable[[int], nn.Module]] = {
    "plain": lambda c: nn.Linear(c, c),
    **{
        name: of(getattr(layers, f"{name}Linear")) for name in ("AOL", "CPL", "SLL", "Cayley", "Bjorck", "Sandwich")
    },
}


def peers() -> tuple[dict[str, Callable[[int], nn.Module]], dict[str, Callable[[int], nn.Module]]]:
    """What orthogonium and deel-torchlip have of these layers."""
    try:
        from deel.torchlip import SpectralLinear
        from orthogonium.layers import OrthoLinear
        from orthogonium.layers.conv.adaptiveSOC.fast_skew_ortho_conv import FastSOC
        from orthogonium.layers.conv.AOC.fast_block_ortho_conv import FastBlockConv2d
        from orthogonium.layers.conv.AOL.aol import AOLConv2D
        from orthogonium.layers.conv.SLL.sll_layer import SDPBasedLipschitzDense, SDPBasedLipschitzResBlock
        from orthogonium.legacy.block_ortho_conv import BCOP
        from orthogonium.legacy.cayley_ortho_conv import Cayley, CayleyLinear
        from orthogonium.legacy.skew_ortho_conv import SOC
    except ImportError as fault:
        print(f"peers do not run: {fault}")
        return {}, {}
    return {
        "AOL, orthogonium": lambda c: AOLConv2D(c, c, 3, padding=1, padding_mode="zeros"),
        "SLL, orthogonium": lambda c: SDPBasedLipschitzResBlock(c, 1, 3),
        "SOC, orthogonium": lambda c: FastSOC(c, c, 3, padding=1, padding_mode="circular"),
        "SOC, its original": lambda c: SOC(c, c, 3),
        "BCOP, orthogonium": lambda c: FastBlockConv2d(c, c, 3, padding=1, padding_mode="circular"),
        "BCOP, its original": lambda c: BCOP(c, c, 3),
        "Cayley, its original": lambda c: Cayley(c, c, 3, padding=1),
    }, {
        "SLL, orthogonium": lambda c: SDPBasedLipschitzDense(c, c, c),
        "Bjorck, orthogonium": lambda c: OrthoLinear(c, c),
        "Bjorck, deel-torchlip": lambda c: SpectralLinear(c, c),
        "Cayley, its original": lambda c: CayleyLinear(c, c),
    }


def training(module: nn.Module, x: Tensor) -> Callable[[], None]:
    module.train()
    module(x)  # some make their parameters at the first forward
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()

    return step


def evaluation(module: nn.Module, x: Tensor) -> Callable[[], None]:
    module.eval()

    @torch.no_grad()
    def forward() -> None:
        module(x)

    return forward


def compare(title: str, sides: dict[str, Callable[[], None]], rounds: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        run()
    for _ in range(rounds):
        for name, run in sides.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    for name, times in seconds.items():
        ratios = sorted(a / b for a, b in zip(times, seconds["plain"], strict=True))
        spread = f"{ratios[len(ratios) // 4]:.2f} – {ratios[-1 - len(ratios) // 4]:.2f}"
        print(f"| {title} | {name} | {statistics.median(ratios):.2f} | {spread} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    convolutions, dense = peers()
    print("| what | layer | times plain | quartiles |\n|---|---|---|---|")
    for title, kinds, shape in [
        ("convolution", CONVOLUTIONS | convolutions, (128, 64, 16, 16)),
        ("dense", DENSE | dense, (256, 512)),
    ]:
        x = torch.randn(shape)
        modules = {}
        for name, kind in kinds.items():
            try:
                modules[name] = kind(shape[1])
                training(modules[name], x.clone().requires_grad_(True))()
            except Exception as fault:  # a peer that does not run on this torch
                print(f"{name} does not run: {type(fault).__name__}: {str(fault).splitlines()[0]}")
                modules.pop(name, None)
        free = x.clone().requires_grad_(True)
        compare(f"{title}, training", {name: training(module, free) for name, module in modules.items()}, rounds)
        frozen = {
            f"{name}, frozen": layers.freeze(modules[name]) for name in ("AOL", "BCOP", "Bjorck") if name in modules
        }
        compare(
            f"{title}, evaluation",
            {name: evaluation(module, x) for name, module in (modules | frozen).items()},
            rounds,
        )


if __name__ == "__main__":
    main()
