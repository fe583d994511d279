"""How many certificates are false: random small networks, judged by rational arithmetic at the edge of each method.

    python benchmarks/soundness.py --cases 100000 --seed 0

A case is one input of one network under one method, and the largest set that the method vouches for: the radius
that comes with a certificate at a random eps, bisected to neighbouring numbers, or the largest eps of which a
certifier of the same settings said "verified" (alpha-crown with two gradient steps). Networks are of the kinds in
``KINDS``, their weights and biases scaled by up to 2^±20, in float32 or float64; sets are balls in l_inf, l_2 and
l_1 within a box, and boxes given entry by entry. The oracle (``exact.py``) looks for a real input of the closed set
at which the class is not strictly the largest, with the float weights taken as they are: in a network of one affine
piece it finds it whenever there is one, else by climbing from the input, from a random vertex and from what an
attack found. Nothing in it is rounded.

Prints what was tried, claimed and false, and the first false case of each batch with what makes it again:
``--seed S --only NUMBER``. Exit code 1 if a certificate is false. Ctrl-C prints what was counted so far.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from exact import Exact, ExactNetwork, ExactRegion, Residual, counterexample
from torch import Tensor, nn

from holdfast import Threat
from holdfast.attacks import PGD
from holdfast.bounds import bound_margins
from holdfast.certify import BoundCertifier, Certificate, LipschitzCertifier
from holdfast.layers import Abs, MaxMin, Normalize

EXAMPLES = 20
"""Inputs of a network: cases of a batch."""
BOUNDS = ("ibp", "crown-ibp", "crown", "cap", "one-step", "alpha-crown", "bcp", "lmt")
METHODS = (*BOUNDS, "cascade", "lipschitz")
REGIONS = ("linf", "linf", "l2", "l2", "l1", "box")
BOXES = ((0.0, 1.0), (0.0, 1.0), (0.0, 2.0), (-3.0, 5.0), (-math.inf, math.inf))


class Draw:
    """What a batch is drawn with: numbers of one seed, in one precision."""

    def __init__(self, seed: int, number: int) -> None:
        self.rng = np.random.default_rng([seed, number])
        self.dtype = self.one_of((torch.float32, torch.float64))

    def one_of(self, choices: tuple[Any, ...]) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def integer(self, low: int, high: int) -> int:
        """Both ends included."""
        return int(self.rng.integers(low, high + 1))

    def power(self, low: float, high: float) -> float:
        """2 to a number drawn in between."""
        return float(2 ** self.rng.uniform(low, high))

    def normal(self, *shape: int) -> Tensor:
        return self.rounded(torch.from_numpy(self.rng.standard_normal(shape)))

    def rounded(self, values: Tensor) -> Tensor:
        """To the precision of the batch, still in float64."""
        return values.to(self.dtype).double()

    @property
    def digits(self) -> int:
        return 24 if self.dtype == torch.float32 else 53


def activation(draw: Draw) -> nn.Module:
    return draw.one_of((nn.ReLU(), nn.ReLU(), nn.LeakyReLU(0.125), nn.Hardtanh(-1.0, 1.0), Abs()))


def linear(draw: Draw) -> tuple[nn.Sequential, tuple[int, ...]]:
    entries = draw.one_of((1, 2, 5, 12, 30, 100, 784))
    return nn.Sequential(nn.Linear(entries, draw.integer(2, 4))), (entries,)


def deep_linear(draw: Draw) -> tuple[nn.Sequential, tuple[int, ...]]:
    width, entries = draw.integer(1, 8), draw.integer(1, 12)
    inner = [nn.Linear(width, width) for _ in range(draw.integer(0, 2))]
    return nn.Sequential(nn.Linear(entries, width), *inner, nn.Linear(width, draw.integer(2, 3))), (entries,)


def dense(draw: Draw) -> tuple[nn.Sequential, tuple[int, ...]]:
    entries, widths = draw.integer(1, 12), [draw.integer(1, 8) for _ in range(draw.integer(1, 3))]
    layers: list[nn.Module] = []
    for before, after in zip([entries, *widths], widths, strict=False):
        layers += [nn.Linear(before, after), activation(draw)]
    return nn.Sequential(*layers, nn.Linear(widths[-1], draw.integer(2, 4))), (entries,)


def active_dense(draw: Draw) -> tuple[nn.Sequential, tuple[int, ...]]:
    model, shape = dense(draw)
    return nn.Sequential(*(child if isinstance(child, nn.Linear) else nn.ReLU() for child in model)), shape


def convolution(draw: Draw) -> tuple[nn.Sequential, tuple[int, ...]]:
    channels, size, out = draw.integer(1, 2), draw.integer(2, 4), draw.integer(1, 3)
    layers: list[nn.Module] = [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU()]
    if draw.rng.random() < 0.3:
        layers += [nn.Conv2d(out, out, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(out * size * size, draw.integer(2, 3))), (
        channels,
        size,
        size,
    )


def average_pool(draw: Draw) -> tuple[nn.Sequential, tuple[int, ...]]:
    out = draw.integer(1, 3)
    layers = [nn.Conv2d(1, out, 3, padding=1), activation(draw), nn.AvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4 * out, draw.integer(2, 3))), (1, 4, 4)


def max_pool(draw: Draw) -> tuple[nn.Sequential, tuple[int, ...]]:
    out = draw.integer(1, 2)
    layers = [nn.Conv2d(1, out, 3, padding=1), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4 * out, draw.integer(2, 3))), (1, 4, 4)


def max_min(draw: Draw) -> tuple[nn.Sequential, tuple[int, ...]]:
    entries, width = draw.integer(1, 8), 2 * draw.integer(1, 3)
    layers = [nn.Linear(entries, width), MaxMin(), nn.Linear(width, width), MaxMin()]
    return nn.Sequential(*layers, nn.Linear(width, draw.integer(2, 3))), (entries,)


def batch_norm(draw: Draw) -> tuple[nn.Sequential, tuple[int, ...]]:
    if draw.rng.random() < 0.5:
        entries, width = draw.integer(1, 8), draw.integer(1, 6)
        layers = [nn.Linear(entries, width), nn.BatchNorm1d(width), activation(draw)]
        return nn.Sequential(*layers, nn.Linear(width, draw.integer(2, 3))), (entries,)
    out = draw.integer(1, 3)
    layers = [nn.Conv2d(1, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(9 * out, draw.integer(2, 3))), (1, 3, 3)


def normalize(draw: Draw) -> tuple[nn.Sequential, tuple[int, ...]]:
    model, shape = convolution(draw)
    mean, std = draw.rng.uniform(0, 1, shape[0]), [draw.power(-6, 2) for _ in range(shape[0])]
    return nn.Sequential(Normalize(mean.tolist(), std), *model), shape


def residual(draw: Draw) -> tuple[nn.Sequential, tuple[int, ...]]:
    entries, width = draw.integer(1, 8), draw.integer(1, 6)
    body = nn.Linear(width, width), activation(draw), nn.Linear(width, width)
    layers = [nn.Linear(entries, width), activation(draw), Residual(*body), activation(draw)]
    return nn.Sequential(*layers, nn.Linear(width, draw.integer(2, 3))), (entries,)


KINDS: dict[str, Callable[[Draw], tuple[nn.Sequential, tuple[int, ...]]]] = {
    "linear": linear,
    "deep linear": deep_linear,
    "always active, dense": active_dense,
    "always active, convolutional": convolution,
    "dense": dense,
    "convolutional": convolution,
    "average pool": average_pool,
    "max pool": max_pool,
    "MaxMin": max_min,
    "BatchNorm": batch_norm,
    "Normalize": normalize,
    "residual": residual,
}


def fill(draw: Draw, model: nn.Sequential, x: Tensor, biases: str) -> Tensor:
    """Draw the weights layer by layer, each with what reaches it from x in float64; the layers' result.

    Args:
        biases: ``absolute`` scales them by 2^±20, ``comparable`` by the spread of what they are added to, and
            ``active`` makes them large and positive, up to where the precision just sees the spread.
    """
    for module in model:
        if isinstance(module, nn.Linear | nn.Conv2d):
            assert module.bias is not None
            weight = draw.normal(*module.weight.shape) / math.sqrt(module.weight[0].numel())
            module.weight.copy_(draw.rounded(weight * draw.power(-20, 20)))
            module.bias.zero_()
            spread = _spread(module(x))
            scale = {
                "absolute": lambda: draw.power(-20, 20),
                "comparable": lambda spread=spread: spread * draw.power(-3, 3),
                "active": lambda spread=spread: spread * draw.power(3, 0.8 * draw.digits),
            }[biases]()
            bias = draw.normal(*module.bias.shape) * scale
            module.bias.copy_(draw.rounded(bias.abs() + scale if biases == "active" else bias))
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            _fill_batch_norm(draw, module, x)
        x = x + fill(draw, module.body, x, biases) if isinstance(module, Residual) else module(x)
    return x


def _fill_batch_norm(draw: Draw, module: nn.BatchNorm1d | nn.BatchNorm2d, x: Tensor) -> None:
    """Running statistics near those of x; variances are squares of few digits, for the sake of the oracle."""
    assert module.running_mean is not None
    assert module.running_var is not None
    dims = [0, *range(2, x.dim())]
    module.eps = 0.0
    mantissa, exponent = torch.frexp(x.std(dims).clamp(min=2.0**-40))
    deviation = torch.ldexp((mantissa * 64).round() / 64, exponent)
    module.running_mean.copy_(draw.rounded(x.mean(dims) + deviation * draw.normal(len(deviation))))
    module.running_var.copy_(deviation.square())
    module.weight.copy_(draw.normal(len(deviation)))
    module.bias.copy_(draw.normal(len(deviation)))


def _spread(values: Tensor) -> float:
    """Of the entries over the examples."""
    return max(float((values - values.mean(0)).abs().mean()), 2.0**-60)


@torch.no_grad()
def network(draw: Draw, kind: str, low: float, high: float) -> tuple[nn.Sequential, Tensor]:
    """A network of a kind and inputs of it, most of them not far from its class boundaries."""
    model, shape = KINDS[kind](draw)
    model.double().eval()
    width = high - low if math.isfinite(high) else draw.power(-10, 10)
    start = low if math.isfinite(low) else -width / 2
    x = torch.from_numpy(draw.rng.random((EXAMPLES, *shape))) * width
    x[:2] = (x[:2] / width).round() * width  # corners, as black and white are
    x = (draw.rounded(start + x)).clamp(low, high)
    biases = "active" if kind.startswith("always") else draw.one_of(("absolute", "comparable", "active"))
    logits = fill(draw, model, x, biases)
    if draw.rng.random() < 0.9:
        last = model[-1]
        assert isinstance(last, nn.Linear)
        offset = _spread(logits) * draw.power(-4, 2) * draw.normal(logits.shape[1])
        near = logits[draw.integer(0, EXAMPLES - 1)] + offset
        last.bias.copy_(draw.rounded(last.bias - near))
    return model.to(draw.dtype), x.to(draw.dtype)


@dataclass
class Batch:
    """Inputs of one network under one method."""

    number: int
    draw: Draw
    kind: str
    method: str
    region: str
    threat: Threat
    model: nn.Sequential
    x: Tensor
    y: Tensor
    claims: list[tuple[str, ExactRegion] | None] = field(default_factory=list)
    """What is said to hold of each input: in words, and the set; None where nothing is."""

    @classmethod
    def drawn(cls, seed: int, number: int) -> Batch:
        draw = Draw(seed, number)
        method, kind = METHODS[number % len(METHODS)], draw.one_of(tuple(KINDS))
        region = draw.one_of(REGIONS if method in BOUNDS else REGIONS[:-1])
        low, high = draw.one_of(BOXES)
        norm = "linf" if region == "box" else region
        eps = 0.0 if draw.rng.random() < 0.05 else draw.power(-16, 1)
        model, x = network(draw, kind, low, high)
        with torch.no_grad():
            y = model(x).argmax(1)
        return cls(number, draw, kind, method, region, Threat(norm, eps, low, high), model, x, y)

    def certify(self, eps: float, search: bool) -> Certificate:
        """By the public certifiers."""
        certifier = (
            LipschitzCertifier()
            if self.method == "lipschitz"
            else BoundCertifier(
                method=self.method,  # type: ignore[arg-type]
                iterations=2,
                radius_tolerance=1e-300,  # until 64 bisections have been made
                radius_search="always" if search else "never",
            )
        )
        return certifier(self.model, self.x, self.y, self.threat.with_eps(eps))

    def ball(self, example: int, eps: float) -> ExactRegion:
        threat = self.threat
        return ExactRegion.ball(self.x[example], threat.norm, eps, threat.low, threat.high)

    def claim(self) -> None:
        """Ask the method."""
        self.claims = self._boxes() if self.region == "box" else self._balls()

    def _balls(self) -> list[tuple[str, ExactRegion] | None]:
        first = self.certify(self.threat.eps, search=True)
        verdicts = torch.where(first.verified, self.threat.eps, -1.0).double()
        verdicts = self._edge(first.radius, verdicts).tolist()
        claims: list[tuple[str, ExactRegion] | None] = []
        for example, (radius, verdict) in enumerate(zip(first.radius.tolist(), verdicts, strict=True)):
            word = f"radius {radius!r}" if radius >= verdict else f"verdict at {verdict!r}"
            said = first.verified[example] or radius > 0 or verdict >= 0
            claims.append((word, self.ball(example, max(radius, verdict))) if said else None)
        return claims

    def _edge(self, radius: Tensor, verdicts: Tensor) -> Tensor:
        """The largest eps with a verdict "verified", bisected to neighbouring doubles for one example; what the
        others are told on the way counts."""
        candidates = ((radius > 0) & radius.isfinite()).nonzero().flatten()
        if not len(candidates):
            return verdicts
        example = int(candidates[int(self.draw.rng.integers(len(candidates)))])
        low, high = float(radius[example]), math.inf
        step = math.ulp(low)
        for _ in range(40):
            middle = low + step if math.isinf(high) else (low + high) / 2
            if not low < middle < high:
                break
            verified = self.certify(middle, search=False).verified
            verdicts = torch.where(verified & (verdicts < middle), middle, verdicts)
            low, high = (middle, high) if verified[example] else (low, middle)
            step *= 8
        return verdicts

    def _boxes(self) -> list[tuple[str, ExactRegion] | None]:
        """Boxes around all inputs at once, grown and bisected."""
        shares = torch.from_numpy(self.draw.rng.random((2, *self.x.shape))).to(self.x)
        low = torch.zeros(len(self.x), dtype=torch.float64)
        high = torch.full_like(low, self.draw.power(-8, 4))
        ends: list[tuple[Tensor, Tensor] | None] = [None] * len(self.x)
        for _ in range(45):
            middle = ((low + high) / 2).to(self.x).view(-1, *[1] * (self.x.dim() - 1))
            lower = (self.x - middle * shares[0]).clamp(min=self.threat.low)
            upper = (self.x + middle * shares[1]).clamp(max=self.threat.high)
            with torch.no_grad():
                margins = bound_margins(self.model, self.x, self.y, (lower, upper), self.method)
            holds = (margins > 0).all(1)
            for example in holds.nonzero().flatten().tolist():
                ends[example] = lower[example], upper[example]
            low, high = torch.where(holds, (low + high) / 2, low), torch.where(holds, high, (low + high) / 2)
        return [
            None if each is None else ("box", ExactRegion.between(self.x[example], *each))
            for example, each in enumerate(ends)
        ]

    def starts(self) -> Tensor | None:
        """What an attack finds at a typical claimed size, (N, ...)."""
        if self.kind.endswith("linear") or self.kind.startswith("always"):
            return None
        sizes = sorted(region.radius for _, region in filter(None, self.claims))
        if not sizes:
            return None
        threat = self.threat.with_eps(sizes[len(sizes) // 2])
        return PGD(steps=8)(self.model, self.x, self.y, threat, seed=self.number).x_adv

    def false(self) -> Iterator[tuple[int, str, Exact]]:
        """Example, claim and counterexample of what does not hold."""
        oracle, attacked = ExactNetwork(self.model, tuple(self.x.shape[1:])), self.starts()
        for example, claim in enumerate(self.claims):
            if claim is None:
                continue
            starts = [] if attacked is None else self._starts(claim[1], attacked[example])
            if (point := counterexample(oracle, claim[1], int(self.y[example]), starts)) is not None:
                yield example, claim[0], point

    def _starts(self, region: ExactRegion, attacked: Tensor) -> list[Exact]:
        vertex = self.draw.rng.integers(0, 2, attacked.numel()).astype(object) * 2 - 1
        return [region.nearby(attacked), region.worst(vertex)]


@dataclass
class Count:
    """Cases by (method, kind, precision)."""

    tried: Counter[tuple[str, ...]] = field(default_factory=Counter)
    refused: Counter[tuple[str, ...]] = field(default_factory=Counter)
    claimed: Counter[tuple[str, ...]] = field(default_factory=Counter)
    false: Counter[tuple[str, ...]] = field(default_factory=Counter)
    words: Counter[str] = field(default_factory=Counter)
    """Why batches were refused."""

    def judge(self, batch: Batch) -> None:
        key = batch.method, batch.kind, str(batch.draw.dtype).removeprefix("torch."), batch.region
        self.tried[key] += len(batch.x)
        try:
            batch.claim()
        except (ValueError, torch.linalg.LinAlgError) as fault:  # refused in words, or not computed at all
            self.refused[key] += len(batch.x)
            self.words[f"{batch.method}: {type(fault).__name__}: {str(fault)[:90]}"] += len(batch.x)
            return
        self.claimed[key] += sum(claim is not None for claim in batch.claims)
        for found, (example, word, point) in enumerate(batch.false()):
            self.false[key] += 1
            if not found:
                print(f"FALSE --only {batch.number}, example {example}: {', '.join(key)}, {word} at", end=" ")
                print(f"{batch.threat}: {point.floats()[:4]}", flush=True)

    def table(self, place: int, title: str) -> None:
        """The cases by one part of their keys."""
        print(f"\n| {title} | tried | refused | claimed | false |\n| --- | --- | --- | --- | --- |")
        for name in sorted({key[place] for key in self.tried}):
            each = [sum(n for key, n in c.items() if key[place] == name) for c in self._counters]
            print(f"| {name} | {' | '.join(f'{n:,}' for n in each)} |")
        print(f"| all | {' | '.join(f'{sum(c.values()):,}' for c in self._counters)} |")

    @property
    def _counters(self) -> tuple[Counter[tuple[str, ...]], ...]:
        return self.tried, self.refused, self.claimed, self.false

    def report(self) -> None:
        print("\n| method | network | precision | region | tried | refused | claimed | false |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for key in sorted(self.tried):
            print(f"| {' | '.join(key)} | {' | '.join(f'{c[key]:,}' for c in self._counters)} |")
        for place, title in enumerate(("method", "network", "precision", "region")):
            self.table(place, title)
        for word, cases in self.words.most_common(20):
            print(f"refused {cases}: {word}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of a single batch")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    count, started = Count(), time.perf_counter()
    numbers = range(-(-options.cases // EXAMPLES)) if options.only is None else [options.only]
    try:
        for number in numbers:
            count.judge(Batch.drawn(options.seed, number))
            if number % 100 == 99:
                tried, claimed, false = (sum(c.values()) for c in (count.tried, count.claimed, count.false))
                seconds = time.perf_counter() - started
                print(f"{tried} tried, {claimed} claimed, {false} false, {seconds:.0f} s", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted")
    count.report()
    return int(count.false.total() > 0)


if __name__ == "__main__":
    sys.exit(main())
