"""Images per second of natural training on CIFAR-10: holdfast, a DataLoader, and the limit, in one run.

    HOLDFAST_DATA=... python benchmarks/training.py [network ...]

Three loops train the same network with the same optimiser on the same 10,000 images, flipped and cropped:
holdfast's; torch's ``DataLoader`` with two worker processes and the transforms of each sample in Python,
as torchvision's users write them; and forward, backward and step on one batch that never changes, which is
the limit for any loop. They take turns, an epoch each, so that what else the machine does hits all alike.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from holdfast import Threat
from holdfast.data import ImageSet, load_data
from holdfast.data.augmentation import Crop, Flip
from holdfast.models import build
from holdfast.objectives import CrossEntropy
from holdfast.training import SGD, Constant, Training, fit
from holdfast.training.engine import Engine

BATCH, ROUNDS, LR = 128, 5, 0.01
NETWORKS = ("cnn-small", "cnn-4c3f", "cnn002")


class PerSample(Dataset):
    """One image at a time, flipped and cropped in Python."""

    def __init__(self, images: ImageSet) -> None:
        self.images, self.labels = images.images, images.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = self.images[index].float().div(255)
        if random.random() < 0.5:
            x = x.flip(2)
        top, left = random.randrange(9), random.randrange(9)
        return F.pad(x, [4] * 4)[:, top : top + 32, left : left + 32], self.labels[index]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def limit(model: nn.Module, optimizer: torch.optim.Optimizer, batches: int, x: Tensor, y: Tensor) -> None:
    for _ in range(batches):
        step(model, optimizer, x, y)


def ours(model: nn.Module, images: ImageSet) -> None:
    training = Training(epochs=1, batch_size=BATCH, augmentations=[Flip(), Crop()])
    engine = Engine(accelerator="cpu").start()
    fit(model, images, CrossEntropy(), Threat("linf", 0), SGD(lr=LR), Constant(), training, engine)
    model.train()


def per_sample(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader) -> None:
    for x, y in loader:
        step(model, optimizer, x, y)


def main() -> None:
    torch.manual_seed(0)
    images = load_data("cifar10", train_size=10_000).train
    assert isinstance(images, ImageSet)
    batches = -(-len(images) // BATCH)
    print(f"{len(images)} images, batches of {BATCH}, {torch.get_num_threads()} threads, {ROUNDS} rounds in turns")
    print(
        "| network | limit, images/s | holdfast / limit (range) | DataLoader / limit (range) |\n|---|---|---|---|"
    )
    for name in sys.argv[1:] or NETWORKS:
        model = build(name, input_shape=images.shape, num_classes=10).train()
        optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=5e-4, nesterov=True)
        loader = DataLoader(PerSample(images), BATCH, shuffle=True, num_workers=2, persistent_workers=True)

        loops = {
            "limit": partial(limit, model, optimizer, batches, *images.batch(slice(BATCH))),
            "ours": partial(ours, model, images),
            "per sample": partial(per_sample, model, optimizer, loader),
        }
        seconds: dict[str, list[float]] = {loop: [] for loop in loops}
        for round in range(ROUNDS + 1):
            for loop, run in loops.items():
                started = time.perf_counter()
                run()
                if round:  # the first warms up
                    seconds[loop].append(time.perf_counter() - started)
        rate = len(images) / statistics.median(seconds["limit"])
        row = [name, f"{rate:.0f}"]
        for loop in ("ours", "per sample"):
            pairs = zip(seconds["limit"], seconds[loop], strict=True)
            shares = sorted(fast / slow for fast, slow in pairs)
            row.append(f"{statistics.median(shares):.2f} ({shares[0]:.2f} – {shares[-1]:.2f})")
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
