"""What certifying large networks of many classes takes: peak memory of a process, and how progress is told.

    python benchmarks/memory.py cnn7 crown-ibp --images 20       # 64×64, 200 classes
    python benchmarks/memory.py resnet50 ibp --images 2          # 224×224, 1,000 classes

Networks are as torch draws them, images random, the threat tiny: what is bounded how well is not the point.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
from torch import Tensor, nn

from holdfast import Threat
from holdfast.certify import BoundCertifier
from holdfast.models import build

STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
"""Width, blocks and stride of each stage of a ResNet-50."""


class Bottleneck(nn.Module):
    """relu(short(h) + f(h)) with three convolutions (He et al., 2016)."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_normalised(before, width, 1, 1),
            nn.ReLU(),
            *_normalised(width, width, 3, stride),
            nn.ReLU(),
            *_normalised(width, 4 * width, 1, 1),
        )
        alike = before == 4 * width and stride == 1
        self.short = nn.Identity() if alike else nn.Sequential(*_normalised(before, 4 * width, 1, stride))

    def forward(self, h: Tensor) -> Tensor:
        return torch.relu(self.body(h) + self.short(h))


def _normalised(before: int, width: int, kernel: int, stride: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(before, width, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(width)


def resnet50(classes: int) -> nn.Module:
    layers: list[nn.Module] = [*_normalised(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    before = 64
    for width, blocks, stride in STAGES:
        for number in range(blocks):
            layers.append(Bottleneck(before, width, stride if number == 0 else 1))
            before = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def peak() -> float:
    """Of this process so far, in gigabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=("cnn7", "resnet50"))
    parser.add_argument("method")
    parser.add_argument("--images", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    size = 64 if given.network == "cnn7" else 224
    model = build("cnn7", input_shape=(3, size, size), num_classes=200) if size == 64 else resnet50(1000)
    model.eval().requires_grad_(False)
    x = torch.rand(given.images, 3, size, size)
    with torch.no_grad():
        y = torch.cat([model(some) for some in x.split(4)]).argmax(1)
    started = time.process_time()

    def tell(left: int, _: int) -> None:
        print(f"{left} left after {time.process_time() - started:.0f} CPU seconds, {peak():.2f} GB", flush=True)

    certifier = BoundCertifier(method=given.method, radius_search="never", float64="never")
    certifier(model, x, y, Threat("linf", 1e-6), on_progress=tell)


if __name__ == "__main__":
    main()
