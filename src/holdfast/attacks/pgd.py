"""Projected gradient descent."""

from __future__ import annotations

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from holdfast.attacks.attack import Attack, cross_entropy_until_wrong
from holdfast.inference import example_generators, mix_seed
from holdfast.search import Ascent, ascend
from holdfast.threat import Threat


class PGD(Attack, name="pgd"):
    """Projected steepest ascent of the cross-entropy, best point kept (Madry et al., 2018)."""

    steps: PositiveInt = 100
    """Gradient steps of each restart; the point after the last one is tested as well."""
    restarts: PositiveInt = 1
    """Independent starts; an example stops at its first success."""
    step_size: PositiveFloat | None = None
    """Length of a step in units of eps; 2.5 / steps by default, but at most 1."""
    random_start: bool = True
    """Start at a uniform point of the threat set; from the input itself otherwise."""

    @property
    def title(self) -> str:
        return f"PGD-{self.steps}" + (f" × {self.restarts}" if self.restarts > 1 else "")

    def perturb(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        seed: int,
        indices: Tensor,
        batch_size: int,
    ) -> Ascent:
        def start(rows: Tensor, restart: int) -> Tensor:
            if not self.random_start:
                return x[rows]
            generators = example_generators(mix_seed(seed, restart), indices[rows.cpu()])
            return threat.random_point(x[rows], generators)

        return ascend(
            cross_entropy_until_wrong(model, y),
            x,
            threat,
            steps=self.steps,
            step_size=threat.eps * (self.step_size or min(1.0, 2.5 / self.steps)),
            start=start,
            restarts=self.restarts,
            batch_size=batch_size,
        )
