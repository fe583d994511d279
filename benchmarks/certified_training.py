"""IBP training and certification on MNIST: holdfast against a plain hand-written loop, in one run; beside it what
CROWN-IBP costs and certifies, margin by margin as published and with loss fusion.

    HOLDFAST_DATA=... python benchmarks/certified_training.py [epochs]

The loop is what one writes by hand: the network as a list of layers, centre and radius, last-layer
elision, Adam, torch's one-cycle schedule. Both sides get the same images, settings and threads, and
train in turns, an epoch each, so that what else the machine does hits both alike.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast import Threat, evaluate
from holdfast.data import ImageSet, load_data
from holdfast.models import build
from holdfast.objectives import CROWNIBP, IBP
from holdfast.objectives.certified import CertifiedTraining
from holdfast.training import Adam, OneCycle, Training, fit
from holdfast.training.engine import Engine
from holdfast.training.loop import Reporter

EPS, BATCH, LR, KAPPA = 0.1, 256, 5e-3, 0.0


def plain_margins(layers: list[nn.Module], x: Tensor, y: Tensor, eps: float) -> Tensor:
    lower, upper = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    centre, radius = (lower + upper) / 2, (upper - lower) / 2
    for layer in layers[:-1]:
        if isinstance(layer, nn.Linear):
            centre, radius = layer(centre), F.linear(radius, layer.weight.abs())
        elif isinstance(layer, nn.Conv2d):
            centre = layer(centre)
            radius = F.conv2d(radius, layer.weight.abs(), None, layer.stride, layer.padding)
        elif isinstance(layer, nn.ReLU):
            lower, upper = (centre - radius).relu(), (centre + radius).relu()
            centre, radius = (lower + upper) / 2, (upper - lower) / 2
        else:
            centre, radius = layer(centre), layer(radius)
    last = layers[-1]
    rows = last.weight[y][:, None] - last.weight[None]
    offset = last.bias[y][:, None] - last.bias[None]
    return torch.einsum("nkd,nd->nk", rows, centre) + offset - torch.einsum("nkd,nd->nk", rows.abs(), radius)


def plain_epochs(model: nn.Module, images: ImageSet, epochs: int) -> Iterator[float]:
    """Train by hand; yields the seconds of each epoch."""
    layers, optimizer = list(model), torch.optim.Adam(model.parameters(), LR)
    steps = -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=epochs * steps)
    pixels = images.images.float().div(255)
    step = 0
    for _ in range(epochs):
        started = time.perf_counter()
        for rows in torch.randperm(len(images)).split(BATCH):
            x, y = pixels[rows], images.labels[rows]
            ramp = min(step / (0.5 * epochs * steps), 1.0)
            kappa = 1 - ramp * (1 - KAPPA)
            loss = kappa * F.cross_entropy(model(x), y)
            if ramp > 0:
                loss = loss + (1 - kappa) * F.cross_entropy(-plain_margins(layers, x, y, ramp * EPS), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
        yield time.perf_counter() - started


class TakingTurns(Reporter):
    """Lets the other side train an epoch after each of ours."""

    def __init__(self, other: Iterator[float]) -> None:
        self.other = other
        self.ours: list[float] = []
        self.theirs: list[float] = []

    def epoch(self, record: dict[str, float]) -> None:
        self.ours.append(record["train_seconds"])
        self.theirs.append(next(self.other))


def trained(objective: CertifiedTraining, images: ImageSet, epochs: int, reporter: Reporter) -> nn.Module:
    torch.manual_seed(0)
    model = build("cnn-small", input_shape=(1, 28, 28), num_classes=10)
    training, engine = Training(epochs=epochs, batch_size=BATCH), Engine(accelerator="cpu").start()
    fit(model, images, objective, Threat("linf", EPS), Adam(lr=LR), OneCycle(), training, engine, reporter=reporter)
    return model


def row(name: str, model: nn.Module, seconds: list[float], test: ImageSet, method: str) -> str:
    images, labels = test.batch(slice(None))
    attacks, certifiers = [{"name": "pgd", "steps": 40}], [{"name": "bounds", "method": method}]
    summary = evaluate(model, images, labels, Threat("linf", EPS), attacks, certifiers).summary
    accuracies = summary["standard"], summary["attacked"]["pgd"], summary["certified"]["bounds"]
    cells = " | ".join(f"{100 * accuracy:.2f} %" for accuracy in accuracies)
    return f"| {name} | {sum(seconds):.1f} | {cells} | {method} |"


def main() -> None:
    epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    torch.set_num_threads(2)
    splits = load_data("mnist", validation=0.05)
    torch.manual_seed(0)
    plain = build("cnn-small", input_shape=(1, 28, 28), num_classes=10)
    turns = TakingTurns(plain_epochs(plain, splits.train, epochs))
    ours = trained(IBP(kappa=KAPPA, ramp_end=0.5), splits.train, epochs, turns)
    print("| side | training, s | standard | PGD-40 | certified | by |")
    print("| --- | --- | --- | --- | --- | --- |")
    print(row("IBP, hand-written", plain, turns.theirs, splits.test, "ibp"))
    print(row("IBP, holdfast", ours, turns.ours, splits.test, "ibp"))
    for fused in (False, True):
        alone = TakingTurns(itertools.repeat(0.0))
        model = trained(CROWNIBP(beta=1.0, ramp_end=0.5, fused=fused), splits.train, epochs, alone)
        name = f"CROWN-IBP, {'fused' if fused else 'margin by margin'}"
        print(row(name, model, alone.ours, splits.test, "crown-ibp"), flush=True)
    print(f"\nIBP, holdfast / hand-written: {sum(turns.ours) / sum(turns.theirs):.2f} of the training time")


if __name__ == "__main__":
    main()
