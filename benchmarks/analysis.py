"""Local Lipschitz constants and class separation against what was used before, in one run.

    HOLDFAST_DATA=... python benchmarks/analysis.py --images 512 --queries 10000

Local Lipschitz: ``cnn002`` trained on MNIST by TRADES, l_inf 0.1, the 1-norm of the logits. Beside holdfast the
published schedule (Yang et al., 2020), written anew: batches of 16, f(x) computed again at every step, steps of
0.003, the last point; as published it goes down the gradient, here also up. Ten steps from a start near the image.

Separation: queries of the MNIST test set against its 60,000 training images of other classes, l_inf, against the
brute-force neighbours of scikit-learn (the distances must be equal) on as many threads. Peak memory is that of a
process of its own, beyond what it held before.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import threading
import time

import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn

from holdfast import Threat
from holdfast.analysis import local_lipschitz, separation
from holdfast.data import find_data, load_data
from holdfast.models import build
from holdfast.objectives import TRADES
from holdfast.training import Adam, OneCycle, Training, fit
from holdfast.training.engine import Engine

THREAT = Threat("linf", 0.1)
STEPS = 10


def network(steps: int) -> nn.Module:
    images = load_data("mnist").train
    torch.manual_seed(0)
    model = build("cnn002", input_shape=images.shape, num_classes=10)
    engine, schedule = Engine(accelerator="cpu").start(), OneCycle()
    training = Training(steps=steps, batch_size=64)
    fit(model, images, TRADES(), THREAT, Adam(lr=2e-3), schedule, training, engine)
    return model.eval()


def published(model: nn.Module, x: Tensor, sign: int) -> Tensor:
    """The quotient at the last point of the published schedule, (N,)."""
    found = []
    for batch in x.split(16):
        points = batch + 0.001 * torch.randn_like(batch)

        def quotient(points: Tensor, batch: Tensor = batch) -> Tensor:
            distance = (batch - points + 1e-6).flatten(1).abs().amax(1)
            return (model(batch) - model(points)).abs().sum(1) / distance

        for _ in range(STEPS):
            points = points.detach().requires_grad_(True)
            quotient(points).sum().backward()
            points = points.detach() + sign * 0.003 * points.grad.sign()
            points = batch + (points - batch).clamp(-THREAT.eps, THREAT.eps)
            points = points.clamp(0, 1)
        with torch.no_grad():
            found.append(quotient(points))
    return torch.cat(found)


def compare_quotients(images: int, steps: int) -> None:
    model = network(steps)
    x = load_data("mnist").test.batch(slice(images))[0]
    sides = {
        "published schedule, as it is": lambda: published(model, x, -1),
        "published schedule, upwards": lambda: published(model, x, 1),
        "holdfast": lambda: local_lipschitz(model, x, THREAT, steps=STEPS, restarts=1, upper=False).value,
        "holdfast, 50 steps": lambda: local_lipschitz(model, x, THREAT, restarts=1, upper=False).value,
        "holdfast, five restarts": lambda: local_lipschitz(model, x, THREAT, upper=False).value,
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    values = {}
    for _ in range(5):  # in turn, so that a busy moment meets all
        for name, measure in sides.items():
            torch.manual_seed(0)
            started = time.perf_counter()
            values[name] = measure()
            times[name].append(time.perf_counter() - started)
    reference = np.median(times["published schedule, as it is"]) / STEPS
    print("| local Lipschitz constant | milliseconds a step | times faster a step | mean found | max found |")
    print("|---|---|---|---|---|")
    for name, value in values.items():
        each = np.median(times[name]) / (50 if "50" in name else STEPS)
        print(f"| {name} | {1000 * each:.0f} | {reference / each:.2f} | {value.mean():.2f} | {value.max():.2f} |")


def brute_force(x: Tensor, y: Tensor, queries: Tensor, labels: Tensor, jobs: int) -> Tensor:
    found = torch.empty(len(queries))
    for label in labels.unique().tolist():
        rivals, mine = x[y != label].flatten(1).numpy(), labels == label
        search = NearestNeighbors(n_neighbors=1, algorithm="brute", metric="chebyshev", n_jobs=jobs).fit(rivals)
        found[mine] = torch.from_numpy(search.kneighbors(queries[mine].flatten(1).numpy())[0][:, 0]).float()
    return found


def resident() -> float:
    """MiB that the process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _peak(memory: int, queries: int, pipe: multiprocessing.connection.Connection) -> None:
    x, y, q, labels = mnist(queries)
    before, seen, done = resident(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            seen[0] = max(seen[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    separation(x, y, queries=q, query_labels=labels, memory=memory * 2**20)
    done.set()
    watcher.join()
    pipe.send(seen[0] - before)


def mnist(queries: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    train, test = find_data("mnist").read()
    return *train.batch(slice(None)), *test.batch(slice(queries))


def compare_separation(queries: int, peer: int, jobs: int) -> None:
    x, y, q, labels = mnist(queries)
    started = time.perf_counter()
    ours = separation(x, y, queries=q, query_labels=labels).distance
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    theirs = brute_force(x, y, q[:peer], labels[:peer], jobs)
    other = time.perf_counter() - started
    print("\n| separation, l_inf | queries | seconds | milliseconds a query | times faster |")
    print("|---|---|---|---|---|")
    print(f"| scikit-learn, brute force | {peer} | {other:.0f} | {1000 * other / peer:.1f} | 1 |")
    ratio = (other / peer) / (seconds / queries)
    print(f"| holdfast | {queries} | {seconds:.0f} | {1000 * seconds / queries:.1f} | {ratio:.1f} |")
    print(f"largest difference {(ours[:peer] - theirs).abs().max():.1e}; smallest distance {ours.min():.4f}")
    for memory in (64, 256, 1024):
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("spawn").Process(target=_peak, args=(memory, 2000, sender))
        process.start()
        print(f"memory={memory} MiB: the process grows by {receiver.recv():.0f} MiB")
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=512, help="of the local Lipschitz constants")
    parser.add_argument("--training", type=int, default=400, help="steps that the network is trained")
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--peer", type=int, default=10_000, help="queries that scikit-learn is asked")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    compare_quotients(given.images, given.training)
    compare_separation(given.queries, given.peer, given.threads)


if __name__ == "__main__":
    main()
