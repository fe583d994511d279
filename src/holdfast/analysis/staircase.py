"""The staircase: when does training for robustness cost accuracy, and when does it help?

A regression on ten stairs (after Raghunathan et al., 2020; Yang et al., 2020, appendix): x is a stair s, rarely
moved by a third, and y = s + noise whether it was moved or not. The adversary may move x by a third, so that the
true function, a staircase, is both accurate and robust, but a smooth fit to few points need not find it. Cubic
splines are fitted by the losses of the library's defences, on few points and on many: ``holdfast study staircase``.

Two penalties of the published notebook are not what it calls them: its gradient regularisation takes the gradient
for the parameters and its local linearity second differences for a slope. Here both are of the input, so that their
rows are not comparable with the published ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import pandas as pd
import torch
from scipy.interpolate import BSpline
from scipy.optimize import minimize
from torch import Tensor

STAIRS = np.arange(10)
SHIFT = 1 / 3
"""How far the adversary may move a point."""
SMOOTHING = 0.01
"""Weight of the roughness θᵀPθ, P of second differences."""
_INNER = np.sort(np.concatenate([STAIRS - SHIFT, STAIRS, STAIRS + SHIFT]))
KNOTS = np.concatenate([_INNER[0] - SHIFT - np.arange(3, -1, -1), _INNER, _INNER[-1] + np.arange(1, 5)])
_SPLINES = BSpline(KNOTS, np.eye(len(KNOTS) - 4), 3)
_SECOND = np.diff(np.eye(len(KNOTS) - 4), 2, axis=0)
ROUGHNESS = torch.from_numpy(_SECOND.T @ _SECOND)


def features(x: np.ndarray, derivative: int = 0) -> Tensor:
    """Values of the basis functions, or their derivatives, (n, 34)."""
    return torch.from_numpy(np.asarray(_SPLINES(x, nu=derivative)))


@dataclass(frozen=True)
class Points:
    """A sample: n points and their labels."""

    x: np.ndarray
    y: Tensor

    @classmethod
    def draw(cls, count: int, seed: int) -> Points:
        """x = a stair, the first five twenty times as likely, moved with probability 0.005; y = stair + noise."""
        generator = np.random.default_rng(seed)
        weights = np.repeat([0.2, 0.01], 5)
        stair = generator.choice(STAIRS, count, p=weights / weights.sum())
        moved = generator.choice([-SHIFT, 0.0, SHIFT], count, p=[0.0025, 0.995, 0.0025])
        return cls(stair + moved, torch.from_numpy(stair + 0.1 * generator.standard_normal(count)))

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Features (m, 4, 34) of ``seen`` at the m places where points lie, and the place of each point, (n,)."""
        where, number = np.unique(self.x, return_inverse=True)
        parts = [features(where - SHIFT), features(where), features(where + SHIFT), features(where, 1)]
        return torch.stack(parts, 1), torch.from_numpy(number)

    def seen(self, theta: Tensor) -> Tensor:
        """What a loss may look at: f(x − 1/3), f(x), f(x + 1/3) and f'(x), (n, 4)."""
        basis, number = self.places
        return (basis @ theta)[number]


Loss = Callable[[Tensor, Tensor, float], Tensor]
"""(seen (n, 4), y (n,), temperature of the soft maximum) → the loss of each point, (n,)."""
DELTA = torch.tensor([-SHIFT, 0.0, SHIFT], dtype=torch.float64)


def soft_max(values: Tensor, temperature: float) -> Tensor:
    """The largest of each row, made smooth: at most temperature · log 6 too large for six of them."""
    return temperature * torch.logsumexp(values / temperature, dim=1)


def natural(seen: Tensor, y: Tensor, temperature: float) -> Tensor:
    """(f(x) − y)²."""
    return (seen[:, 1] - y).square()


def adversarial(seen: Tensor, y: Tensor, temperature: float) -> Tensor:
    """max (f(x') − y)²."""
    return soft_max((seen[:, :3] - y[:, None]).square(), temperature)


def clean_plus_adversarial(seen: Tensor, y: Tensor, temperature: float, beta: float) -> Tensor:
    """(f(x) − y)² + β max (f(x') − y)²."""
    return natural(seen, y, temperature) + beta * adversarial(seen, y, temperature)


def trades(seen: Tensor, y: Tensor, temperature: float, beta: float) -> Tensor:
    """(f(x) − y)² + β max (f(x') − f(x))²."""
    change = seen[:, :3] - seen[:, 1:2]
    return natural(seen, y, temperature) + beta * soft_max(change.square(), temperature)


def input_gradient(seen: Tensor, y: Tensor, temperature: float, weight: float) -> Tensor:
    """ℓ + λ ½ (dℓ/dx)², ℓ = (f(x) − y)²: not convex."""
    slope = 2 * (seen[:, 1] - y) * seen[:, 3]
    return natural(seen, y, temperature) + weight * 0.5 * slope.square()


def local_linearity(seen: Tensor, y: Tensor, temperature: float, weight: float, mu: float) -> Tensor:
    """ℓ + λ max |ℓ(x') − ℓ(x) − (x' − x) dℓ/dx| + μ max |(x' − x) dℓ/dx|: not convex."""
    here = natural(seen, y, temperature)
    linear = DELTA * (2 * (seen[:, 1] - y) * seen[:, 3])[:, None]
    bent = (seen[:, :3] - y[:, None]).square() - here[:, None] - linear
    gamma = soft_max(torch.cat([bent, -bent], 1), temperature)
    return here + weight * gamma + mu * soft_max(linear, temperature)


METHODS: dict[str, Loss] = {
    "natural": natural,
    "input-gradient": partial(input_gradient, weight=1.0),
    "llr": partial(local_linearity, weight=1.0, mu=0.5),
    "adversarial": adversarial,
    "clean-plus-adversarial (0.5)": partial(clean_plus_adversarial, beta=0.5),
    "clean-plus-adversarial (1)": partial(clean_plus_adversarial, beta=1.0),
    "clean-plus-adversarial (2)": partial(clean_plus_adversarial, beta=2.0),
    "trades (1)": partial(trades, beta=1.0),
    "trades (3)": partial(trades, beta=3.0),
    "trades (6)": partial(trades, beta=6.0),
}


class Penalised:
    """Σ loss + roughness of θ as scipy wants it: value, gradient (34,) and Hessian (34, 34).

    A loss sees four numbers of each point, so that its second derivatives are 4 × 4 blocks, added up by place.
    """

    def __init__(self, loss: Loss, points: Points, temperature: float) -> None:
        self.loss, self.points, self.temperature = loss, points, temperature

    def value(self, theta: np.ndarray) -> float:
        weights = torch.from_numpy(theta)
        total = self.loss(self.points.seen(weights), self.points.y, self.temperature).sum()
        return (total + SMOOTHING * weights @ ROUGHNESS @ weights).item()

    def gradient(self, theta: np.ndarray) -> np.ndarray:
        return self._derivatives(theta)[0].numpy()

    def hessian(self, theta: np.ndarray) -> np.ndarray:
        return self._derivatives(theta, second=True)[1].numpy()

    def _derivatives(self, theta: np.ndarray, second: bool = False) -> tuple[Tensor, Tensor]:
        weights = torch.from_numpy(theta)
        basis, number = self.points.places
        seen = self.points.seen(weights).requires_grad_(True)
        total = self.loss(seen, self.points.y, self.temperature).sum()
        (first,) = torch.autograd.grad(total, seen, create_graph=second)
        by_place = torch.zeros_like(basis[:, :, 0]).index_add(0, number, first.detach())
        gradient = torch.einsum("ma,mak->k", by_place, basis) + 2 * SMOOTHING * ROUGHNESS @ weights
        curvature = 2 * SMOOTHING * ROUGHNESS
        for row in range(4) if second else ():
            (block,) = torch.autograd.grad(first[:, row].sum(), seen, retain_graph=True, materialize_grads=True)
            blocks = torch.zeros_like(by_place).index_add(0, number, block)
            curvature = curvature + torch.einsum("mk,mb,mbl->kl", basis[:, row], blocks, basis)
        return gradient, curvature


def fit(loss: Loss, points: Points, start: Tensor | None = None) -> Tensor:
    """θ (34,) that minimises the penalised loss, by Newton's method while the soft maximum hardens."""
    theta = torch.zeros(len(ROUGHNESS), dtype=torch.float64) if start is None else start
    for temperature in np.logspace(-1, -7, 7):
        goal = Penalised(loss, points, float(temperature))
        options = {"gtol": 1e-7, "maxiter": 200}
        found = minimize(
            goal.value, theta.numpy(), jac=goal.gradient, hess=goal.hessian, method="trust-exact", options=options
        )
        theta = torch.from_numpy(found.x)
    return theta


def errors(theta: Tensor, points: Points) -> dict[str, float]:
    """Mean squared error at the points and at the worst of where they can be moved, and the local Lipschitz
    constant, mean max |f(x') − f(x)| / |x' − x|."""
    seen = points.seen(theta)
    here, around = seen[:, 1], seen[:, :3]
    return {
        "mse": (here - points.y).square().mean().item(),
        "adversarial_mse": (around - points.y[:, None]).square().amax(1).mean().item(),
        "lipschitz": ((around - here[:, None]).abs().amax(1) / SHIFT).mean().item(),
    }


def staircase(
    sizes: Sequence[int] = (40, 30_000), test: int = 10_000, seed: int = 1
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Fits by every method to samples of every size: the table of errors and gaps, and the fits on a grid."""
    unseen, grid = Points.draw(test, seed + 1), np.linspace(-0.5, 9.5, 401)
    rows, curves = [], []
    for size in sizes:
        points = Points.draw(size, seed)
        first = fit(natural, points)
        for name, loss in METHODS.items():
            theta = first if name == "natural" else fit(loss, points, first)
            seen, new = errors(theta, points), errors(theta, unseen)
            rows.append(
                {
                    "points": size,
                    "method": name,
                    "train_mse": seen["mse"],
                    "test_mse": new["mse"],
                    "adversarial_test_mse": new["adversarial_mse"],
                    "test_lipschitz": new["lipschitz"],
                    "gap": new["mse"] - seen["mse"],
                    "adversarial_gap": new["adversarial_mse"] - seen["adversarial_mse"],
                }
            )
            curves.append(pd.DataFrame({"points": size, "method": name, "x": grid, "f": features(grid) @ theta}))
    return pd.DataFrame(rows), pd.concat(curves, ignore_index=True)
