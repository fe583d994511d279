"""Sequential smoothing certificates against the fixed number of samples, on a real network, in one run.

    HOLDFAST_DATA=... python benchmarks/smoothing.py --images 200

``cnn-small`` is trained on MNIST with Gaussian noise of σ = 0.5. Fixed: Cohen et al. (2019) with n = 100,000, one
image after the other in batches of 1,000 as their program has it; its radii answer all four questions at once.
Sequential: each radius is a question of its own, and stops as soon as it is answered. Both select the class with
n0 = 100 samples and have α = 0.001. One thread.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

from holdfast import Threat
from holdfast.certify import SmoothingCertifier, clopper_pearson_lower, smoothing_radius
from holdfast.data import load_data
from holdfast.models import build
from holdfast.objectives import GaussianNoise
from holdfast.training import Adam, OneCycle, Training, fit
from holdfast.training.engine import Engine

SIGMA, N0, N, ALPHA = 0.5, 100, 100_000, 0.001


def network() -> nn.Module:
    images = load_data("mnist").train
    torch.manual_seed(0)
    model = build("cnn-small", input_shape=images.shape, num_classes=10)
    engine, schedule = Engine(accelerator="cpu").start(), OneCycle()
    threat = Threat("l2", 0.5)
    fit(model, images, GaussianNoise(sigma=SIGMA), threat, Adam(lr=2e-3), schedule, Training(epochs=4), engine)
    return model.eval()


@torch.no_grad()
def one_by_one(model: nn.Module, x: Tensor, y: Tensor) -> list[float]:
    """The radius of each image, 0 where the class is wrong or open: a loop over images."""

    def counts(image: Tensor, samples: int) -> Tensor:
        found = torch.zeros(10, dtype=torch.int64)
        for start in range(0, samples, 1000):
            batch = image.expand(min(1000, samples - start), *image.shape)
            found += torch.bincount(model(batch + SIGMA * torch.randn_like(batch)).argmax(1), minlength=10)
        return found

    radii = []
    for image, label in zip(x, y, strict=True):
        winner = int(counts(image, N0).argmax())
        lower = clopper_pearson_lower(int(counts(image, N)[winner]), N, ALPHA)
        radii.append(smoothing_radius(lower, SIGMA) if winner == label else 0.0)
    return radii


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200)
    count = parser.parse_args().images
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = network()
    x, y = load_data("mnist").test.batch(slice(count))
    started = time.perf_counter()
    radii = torch.tensor(one_by_one(model, x, y))
    fixed = time.perf_counter() - started
    print("| radius | certified, fixed | certified, sequential | samples per image | times fewer | times faster |")
    print("|---|---|---|---|---|---|")
    for radius in (0.25, 0.5, 0.75, 1.0):
        certifier = SmoothingCertifier(sigma=SIGMA, n0=N0, n=N, alpha=ALPHA)
        started = time.perf_counter()
        certificate = certifier(model, x, y, Threat("l2", radius), batch_size=1024)
        seconds = time.perf_counter() - started
        samples = certificate.samples.double().mean().item()
        both = [100 * part.double().mean().item() for part in (radii > radius, certificate.verified)]
        print(
            f"| {radius} | {both[0]:.1f} % | {both[1]:.1f} % | {samples:.0f} | {(N0 + N) / samples:.0f} | "
            f"{fixed / seconds:.0f} |",
            flush=True,
        )
    certifier = SmoothingCertifier(sigma=SIGMA, n0=N0, n=1000, alpha=ALPHA)
    times = {}
    for name, size in [("one image at a time", 1), ("packed", len(x))]:
        started = time.perf_counter()
        for image, label in zip(x.split(size), y.split(size), strict=True):
            certifier(model, image, label, Threat("l2", 0.5), batch_size=1024)
        times[name] = len(x) / (time.perf_counter() - started)
        print(f"sequential, at most 1,000 samples, {name}: {times[name]:.1f} images per second")


if __name__ == "__main__":
    main()
