"""How many certificates are false: random small networks, judged by rational arithmetic at the edge of each method.

    python benchmarks/soundness.py --cases 100000 --seed 0

A case is one input of one network under one method, and the largest set that the method vouches for: the radius
that comes with a certificate at a random eps, bisected to neighbouring numbers, or the largest eps of which a
certifier of the same settings said "verified" (alpha-crown with two gradient steps, branch and bound with a
quarter of a second). What branch and bound calls a counterexample is judged, too. Networks are those of
``random_networks.py``, their weights and biases scaled by up to 2^±20, in float32 or float64; sets are balls in
l_inf, l_2 and l_1 within a box, and boxes given entry by entry. The oracle (``exact.py``, ``exact_region.py``)
looks for a real input of the closed set at which the class is not strictly the largest, with the float weights
taken as they are: in a network of one affine piece it finds it whenever there is one, else by climbing from the
input, from a random vertex and from what an attack found. Nothing in it is rounded but smooth functions (sigmoid,
softmax, LayerNorm), to 400 binary places. Not covered: layers whose weights follow from others, and what torch
itself computes of these inputs.

Prints what was tried, claimed and false, and the first false case of each batch with what makes it again:
``--seed S --only NUMBER``, and the same ``--networks``. Exit code 1 if a certificate is false. Ctrl-C prints what
was counted so far.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from exact import Exact, ExactNetwork, exactly
from exact_region import ExactRegion, counterexample
from random_networks import KINDS, Draw, network
from torch import Tensor, nn

from holdfast import Threat
from holdfast.attacks import PGD
from holdfast.bounds import bound_margins
from holdfast.certify import BoundCertifier, BranchAndBoundCertifier, Certificate, LipschitzCertifier

EXAMPLES = 20
"""Inputs of a network: cases of a batch."""
BOUNDS = ("ibp", "crown-ibp", "crown", "cap", "one-step", "alpha-crown", "bcp", "lmt")
METHODS = (*BOUNDS, "cascade", "lipschitz", "branch-and-bound")
SECONDS, ROUNDS = 0.25, 5
"""Of branch and bound for an input, and how often its verdict is bisected for."""
REGIONS = ("linf", "linf", "l2", "l2", "l1", "box")
BOXES = ((0.0, 1.0), (0.0, 1.0), (0.0, 2.0), (-3.0, 5.0), (-math.inf, math.inf))


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
    refuted: list[tuple[int, float, Exact]] = field(default_factory=list)
    """Of an example, at which eps, and what is said to be a counterexample."""

    @classmethod
    def drawn(cls, seed: int, number: int, kinds: tuple[str, ...] = tuple(KINDS)) -> Batch:
        draw = Draw(seed, number)
        method, kind = METHODS[number % len(METHODS)], draw.one_of(kinds)
        region = draw.one_of(REGIONS if method in BOUNDS else REGIONS[:-1])
        low, high = draw.one_of(BOXES)
        norm = "linf" if region == "box" else region
        eps = 0.0 if draw.rng.random() < 0.05 else draw.power(-16, 1)
        model, x = network(draw, kind, EXAMPLES, low, high)
        with torch.no_grad():
            y = model(x).argmax(1)
        return cls(number, draw, kind, method, region, Threat(norm, eps, low, high), model, x, y)

    def certify(self, eps: float, search: bool) -> Certificate:
        """By the public certifiers."""
        certifier = (
            BranchAndBoundCertifier(seconds=SECONDS)
            if self.method == "branch-and-bound"
            else LipschitzCertifier()
            if self.method == "lipschitz"
            else BoundCertifier(
                method=self.method,  # type: ignore[arg-type]
                iterations=2,
                radius_tolerance=1e-300,  # until 64 bisections have been made
                radius_search="always" if search else "never",
            )
        )
        certificate = certifier(self.model, self.x, self.y, self.threat.with_eps(eps))
        if certificate.counterexample is not None:
            self._note_refuted(certificate.counterexample, eps)
        return certificate

    def _note_refuted(self, x_adv: Tensor, eps: float) -> None:
        """Keep the counterexamples."""
        for example in (~x_adv.flatten(1).isnan().any(1)).nonzero().flatten().tolist():
            self.refuted.append((example, eps, exactly(x_adv[example].flatten())))

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
        for _ in range(ROUNDS if self.method == "branch-and-bound" else 40):
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
        for example, eps, point in self.refuted:
            right = bool((oracle.margins(point, int(self.y[example]))[0].top > 0).all())
            if right or not self.ball(example, eps).holds(point):
                yield example, f"counterexample at {eps!r}", point

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
    parser.add_argument(
        "--networks", nargs="*", choices=KINDS, default=[*KINDS], help="kinds of them; all by default"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    count, started = Count(), time.perf_counter()
    numbers = range(-(-options.cases // EXAMPLES)) if options.only is None else [options.only]
    try:
        for number in numbers:
            count.judge(Batch.drawn(options.seed, number, tuple(options.networks)))
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
