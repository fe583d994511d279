"""Noisy copies of inputs, and the classes that a network gives them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from scipy import special
from torch import Tensor, nn

from holdfast.inference import check_logits, mix_seed

FARTHEST = 8.6
"""Standard deviations that no Gaussian draw exceeds, made as it is of at most 53 random bits."""
CHUNK = 64
"""Samples of an example that are drawn together; what is drawn depends on seed, example and their number only."""


@dataclass(frozen=True)
class VoteNoise:
    """What is added to the inputs."""

    kind: Literal["gaussian", "uniform"]
    sigma: float
    """Standard deviation, in input units."""
    grid_bits: int | None = None
    """Round inputs and noise to multiples of 2^−bits each."""

    def draw(self, x: Tensor, seed: int) -> Tensor:
        """``CHUNK`` draws for one example, (CHUNK, ...), on its device."""
        generator = torch.Generator(device=x.device).manual_seed(seed)
        shape = (CHUNK, *x.shape)
        if self.kind == "gaussian":
            noise = torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype)
        else:
            noise = math.sqrt(3) * (2 * torch.rand(shape, generator=generator, device=x.device, dtype=x.dtype) - 1)
        return self.on_grid(self.sigma * noise)

    def on_grid(self, x: Tensor) -> Tensor:
        """Rounded; differentiated as if it were not."""
        if self.grid_bits is None:
            return x
        rounded = (x.detach() * 2**self.grid_bits).round_().mul_(2.0**-self.grid_bits)
        return rounded + (x - x.detach()) if x.requires_grad else rounded

    def check_sums(self, x: Tensor) -> None:
        """Refuse a grid so fine that this type cannot hold every sum of an input and noise on it.

        Raises:
            ValueError: with the finest grid that will do.
        """
        if self.grid_bits is None or not x.numel():
            return
        reach = x.abs().max().item() + self.sigma * (FARTHEST if self.kind == "gaussian" else math.sqrt(3))
        finest = math.floor(math.log2(2 / torch.finfo(x.dtype).eps / reach))
        if self.grid_bits > finest:
            raise ValueError(
                f"noisy inputs reach {reach:.3g}, where {x.dtype} holds no multiples of 2^-{self.grid_bits}: "
                f"expected grid_bits of at most {finest}, or none"
            )

    def radius(self, p: float, dimensions: int) -> float:
        """Within which a class of probability at least p stays the winner; 0 for p ≤ ½."""
        if p <= 0.5:
            return 0.0
        found = float(self.sigma * special.ndtri(p)) if self.kind == "gaussian" else self._width * (p - 0.5)
        return max(0.0, found - self._rounding(dimensions))

    def probability(self, radius: float, dimensions: int) -> float:
        """What p must exceed for this radius; at least ½."""
        reach = radius + (self._rounding(dimensions) if radius > 0 else 0.0)
        if self.kind == "gaussian":
            return float(special.ndtr(reach / self.sigma))
        return 0.5 + reach / self._width

    @property
    def _width(self) -> float:
        return 2 * math.sqrt(3) * self.sigma

    def _rounding(self, dimensions: int) -> float:
        """How much farther apart two inputs on the grid can be than they were."""
        if self.grid_bits is None:
            return 0.0
        return float(2.0**-self.grid_bits * (math.sqrt(dimensions) if self.kind == "gaussian" else dimensions))


@dataclass(frozen=True)
class Task:
    """Some samples of one example: chunk ``number`` of its stream, or the first ``count`` of it."""

    example: int
    number: int
    count: int = CHUNK


class Voter:
    """Draws noisy copies of examples and counts the classes that the network gives them."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        noise: VoteNoise,
        seed: int,
        batch_size: int,
        numbers: Tensor | None = None,
    ) -> None:
        noise.check_sums(x)
        self.numbers = range(len(x)) if numbers is None else numbers.tolist()
        self.model, self.x, self.noise, self.seed = model, noise.on_grid(x), noise, seed
        self.tasks = max(1, batch_size // CHUNK)
        """In a forward pass: of whichever examples are pending."""

    def votes(self, tasks: Sequence[Task], salt: int) -> Tensor:
        """The classes of the samples, (tasks, CHUNK); one forward pass.

        −1 beyond a task's count, and where logits are NaN or inf: such a sample is for no class.
        """
        draws = [
            self.noise.draw(
                self.x[task.example], mix_seed(self.seed, self.numbers[task.example], task.number, salt)
            )
            for task in tasks
        ]
        copies = torch.cat([self.x[task.example] + draw for task, draw in zip(tasks, draws, strict=True)])
        logits = self.model(copies)
        check_logits(logits.nan_to_num(), torch.zeros(len(logits), dtype=torch.int64, device=logits.device))
        classes = logits.argmax(1).masked_fill(~logits.isfinite().all(1), -1).view(len(tasks), CHUNK)
        counts = torch.tensor([task.count for task in tasks], device=classes.device)
        beyond = torch.arange(CHUNK, device=classes.device) >= counts[:, None]
        return classes.masked_fill(beyond, -1)

    def counts(
        self, samples: int, classes: int, salt: int, progress: Callable[[int], None] = lambda left: None
    ) -> Tensor:
        """Votes for each class in so many samples of every example, (N, K) int64; nothing leaves the device.

        They are fewer than the samples where some logits are NaN or inf.

        Args:
            progress: told how many examples are left.
        """
        found = torch.zeros(len(self.x), classes + 1, dtype=torch.int64, device=self.x.device)
        tasks = (
            Task(example, number, min(CHUNK, samples - number * CHUNK))
            for example in range(len(self.x))
            for number in range(-(-samples // CHUNK))
        )
        while part := list(islice(tasks, self.tasks)):
            rows = torch.tensor([task.example for task in part], device=found.device)
            votes = self.votes(part, salt) + 1  # what is for no class falls into column 0
            of_task = torch.nn.functional.one_hot(votes, classes + 1).sum(1)
            found.index_add_(0, rows, of_task)
            progress(len(self.x) - part[-1].example)
        return found[:, 1:]
