"""Square attack: random search with square patches, by forward passes only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from holdfast.attacks.attack import Attack, Targets, require_answers
from holdfast.attacks.losses import gap
from holdfast.search import Ascent, per_example
from holdfast.threat import Threat

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Of 10,000 queries, those after which the share of changed pixels halves."""


class Square(Attack, name="square"):
    """Random search for the largest margin, one square of the image at a time (Andriushchenko et al., 2020).

    l_inf: stripes of ±eps to begin with, then squares in which every channel is ±eps. l_2 and l_1 (Croce &
    Hein, 2021): bumps on a grid to begin with; then the mass of one window goes, with what the ball still
    has to give, to a bump in another. A change stays where it raises the margin. Every query is one forward pass.
    """

    sees: ClassVar[Literal["gradients", "answers"]] = "answers"
    queries: PositiveInt = 5000
    """Forward passes per example; it stops at its first success."""
    restarts: PositiveInt = 1
    """Independent searches."""
    share: float = Field(default=0.8, gt=0, le=1)
    """Share of the pixels that the first square covers."""
    rescaled: bool = True
    """Let the squares shrink over however many queries there are; otherwise after the paper's numbers of them."""

    @property
    def title(self) -> str:
        return f"Square-{self.queries}"

    @property
    def brief(self) -> Attack:
        return self.model_copy(update={"queries": min(self.queries, 500), "restarts": 1})

    def perturb(self, model: nn.Module, targets: Targets, threat: Threat) -> Ascent:
        if targets.x.dim() != 4:
            raise ValueError(f"square patches need images (N, C, H, W), given {tuple(targets.x.shape)}")
        if threat.norm == "l0":
            raise ValueError("square has no form for l0; attack it with fmn")
        search = _Patches if threat.norm == "linf" else _Bumps
        result = Ascent.before(targets.x)
        for restart in range(self.restarts):
            rows = result.unfinished
            # No gradient is kept, so that many more examples fit.
            for part in rows.split(4 * targets.batch_size):
                found = self._search(model, targets.take(part), threat, search(targets.take(part), threat, restart))
                result.absorb(part, found, restart)
        return result

    @torch.no_grad()
    def _search(self, model: nn.Module, targets: Targets, threat: Threat, moves: _Moves) -> Ascent:
        result = Ascent.before(targets.x)
        rows, y = torch.arange(len(targets.x), device=targets.x.device), targets.y
        best = moves.start()
        value = targets.x.new_full((len(rows),), -torch.inf)
        for query in range(self.queries):
            points = best if query == 0 else moves.propose(best, self._side(query, targets.x))
            logits = torch.cat([model(part) for part in points.split(targets.batch_size)])
            new = gap(logits, y)
            require_answers(logits)
            wrong = logits.argmax(1) != y
            better = (new > value) | wrong
            best = torch.where(per_example(better, best), points, best)
            value = torch.where(better, new, value)
            if query == self.queries - 1 or wrong.any():
                done = wrong if query < self.queries - 1 else torch.ones_like(wrong)
                ended = rows[done]
                result.x[ended], result.value[ended], result.finished[ended] = best[done], value[done], wrong[done]
                result.step[ended], result.forwards[ended] = query, query + 1
                going = ~done
                rows, y, best, value = rows[going], y[going], best[going], value[going]
                if not len(rows):
                    break
                moves.keep(going)
        return result

    def _side(self, query: int, x: Tensor) -> int:
        """Side of the square of a query."""
        when = query * 10_000 // self.queries if self.rescaled else query
        halvings = sum(when > limit for limit in HALVINGS)
        pixels = self.share / 2**halvings * x.shape[2] * x.shape[3]
        return max(round(pixels**0.5), 1)

    def describe(self, restart: int, step: int) -> str:
        return f"{self.name} restart {restart} query {step}"


class _Moves(ABC):
    """Starting points and proposals for the examples that are left, drawn per example."""

    def __init__(self, targets: Targets, threat: Threat, restart: int, numbers: int) -> None:
        """With so many uniform numbers for a proposal."""
        self.x, self.threat = targets.x, threat
        self.channels, self.height, self.width = targets.x.shape[1:]
        self.draws, self.drawn, self.numbers = targets.draws(3, restart), 0, numbers
        self.block, self.used = targets.x.new_empty(len(targets.x), 0, numbers), 0

    def keep(self, going: Tensor) -> None:
        """Go on with some of the examples, a mask of them."""
        self.x, self.block, self.draws = self.x[going], self.block[going], self.draws.take(going)

    def signs(self, count: int) -> Tensor:
        """±1, as many for each example, (n, count)."""
        self.drawn += count
        return 2 * self.draws.below(2, count, at=self.drawn - count).to(self.x) - 1

    def uniform(self) -> Tensor:
        """(n, numbers) in [0, 1), drawn for a hundred proposals at a time."""
        if self.used == self.block.shape[1]:
            drawn = self.draws.uniform(100 * self.numbers, at=self.drawn)
            self.block, self.used = drawn.to(self.x).view(-1, 100, self.numbers), 0
            self.drawn += 100 * self.numbers
        self.used += 1
        return self.block[:, self.used - 1]

    def place(self, u: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Top and left from two uniform numbers each."""
        top = (u[:, 0] * (self.height - side + 1)).long().clamp(max=self.height - side)
        return top, (u[:, 1] * (self.width - side + 1)).long().clamp(max=self.width - side)

    @abstractmethod
    def start(self) -> Tensor:
        """The first points, (n, C, H, W)."""

    @abstractmethod
    def propose(self, best: Tensor, side: int) -> Tensor:
        """What to try next, (n, C, H, W), from the best points so far."""


class _Patches(_Moves):
    """l_inf: everything at a corner of the cube."""

    def __init__(self, targets: Targets, threat: Threat, restart: int) -> None:
        super().__init__(targets, threat, restart, 2 + targets.x.shape[1])
        self.lower, self.upper = threat.interval(targets.x)
        self.down = torch.arange(self.height, device=self.x.device)
        self.right = torch.arange(self.width, device=self.x.device)

    def keep(self, going: Tensor) -> None:
        super().keep(going)
        self.lower, self.upper = self.lower[going], self.upper[going]

    def start(self) -> Tensor:
        stripes = self.signs(self.channels * self.width).view(-1, self.channels, 1, self.width)
        return torch.where(stripes > 0, self.upper, self.lower)

    def propose(self, best: Tensor, side: int) -> Tensor:
        u = self.uniform()
        side = min(side, self.height, self.width)
        top, left = self.place(u, side)
        down, right = self.down - top[:, None], self.right - left[:, None]
        rows, columns = (down >= 0) & (down < side), (right >= 0) & (right < side)
        square = rows[:, None, :, None] & columns[:, None, None, :]
        corner = torch.where(u[:, 2:, None, None] < 0.5, self.lower, self.upper)
        return torch.where(square, corner, best)


class _Bumps(_Moves):
    """l_2 and l_1: mass moves between windows, the length stays eps."""

    def __init__(self, targets: Targets, threat: Threat, restart: int) -> None:
        super().__init__(targets, threat, restart, 5 + targets.x.shape[1])
        self.power = 2 if threat.norm == "l2" else 1

    def window(self, top: Tensor, left: Tensor, side: int) -> tuple[Tensor, ...]:
        """Index of a square of each image at its own place, giving (n, C, side, side)."""
        span = torch.arange(side, device=top.device)
        example = torch.arange(len(top), device=top.device)[:, None, None, None]
        channel = torch.arange(self.channels, device=top.device)[None, :, None, None]
        return example, channel, (top[:, None] + span)[:, None, :, None], (left[:, None] + span)[:, None, None, :]

    def bump(self, height: int, width: int) -> Tensor:
        """Rings that fall off from the middle of a height × width window, of length 1; (height, width)."""
        bump = torch.zeros(height, width, dtype=torch.float64)
        top, left = height // 2, width // 2
        for ring in range(1, max(height, width) // 2 + 1):
            rows = slice(max(top - ring, 0), min(top + ring + 1, height))
            columns = slice(max(left - ring, 0), min(left + ring + 1, width))
            bump[rows, columns] += 1 / ring**2
        if not bump.any():
            bump[:] = 1
        return (bump / bump.norm(self.power)).to(self.x)

    def signed_bump(self, side: int, upright: Tensor) -> Tensor:
        """Half positive, half negative; lying on its side where not upright, (n, 1, side, side)."""
        half = side // 2
        bump = torch.zeros(side, side, dtype=self.x.dtype, device=self.x.device)
        bump[:half] = self.bump(half, side) if half else 0
        bump[half:] = -self.bump(side - half, side)
        bump = bump / bump.norm(self.power)
        return torch.where(upright[:, None, None], bump, bump.T)[:, None]

    def start(self) -> Tensor:
        side = max(min(self.height, self.width) // 5, 1)
        delta = torch.zeros_like(self.x)
        for top in range((self.height % side) // 2, self.height - side + 1, side):
            for left in range((self.width % side) // 2, self.width - side + 1, side):
                signs = self.signs(self.channels + 1)[:, :, None, None]
                bump = self.signed_bump(side, signs[:, 0, 0, 0] > 0)
                delta[:, :, top : top + side, left : left + side] = signs[:, 1:] * bump
        return self.stretch(self.x, delta)

    def stretch(self, x: Tensor, delta: Tensor) -> Tensor:
        """The perturbation at length eps, projected."""
        length = self.threat.distance(torch.zeros_like(delta), delta).clamp(min=1e-12)
        return self.threat.project(x, x + delta * per_example(self.threat.eps / length, delta))

    def propose(self, best: Tensor, side: int) -> Tensor:
        u, x = self.uniform(), self.x
        side = min(max(side, 3) | 1, self.height, self.width)
        to, source = (self.window(*self.place(u[:, i : i + 2], side), side) for i in (0, 2))
        signs = torch.where(u[:, 5:] < 0.5, -1.0, 1.0).to(best)[:, :, None, None]
        delta, power = best - x, self.power

        def mass(window: Tensor) -> Tensor:
            """Σ |entries|^p over space, per channel."""
            return window.abs().pow(power).sum((2, 3), keepdim=True)

        here = torch.zeros_like(delta, dtype=torch.bool)
        here[to] = True
        here[source] = True
        union = mass(delta * here)
        spare = (self.threat.eps**power - delta.abs().pow(power).sum((1, 2, 3), keepdim=True)).clamp(min=0)
        old = delta[to]
        old = old / mass(old).pow(1 / power).clamp(min=1e-12)
        new = old + signs * self.signed_bump(side, u[:, 4] < 0.5)
        budget = (spare / self.channels + union).pow(1 / power)
        new = new * budget / mass(new).pow(1 / power).clamp(min=1e-12)
        delta[source] = 0
        delta[to] = new
        return self.stretch(x, delta)
