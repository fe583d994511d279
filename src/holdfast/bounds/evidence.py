"""Inputs to try a rule on, and how what it claims is denied: with the input, and with what it is wrong by."""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.bounds.operators import Operator, Shape, UnsupportedOperator

BUDGET = 2**18
"""Entries held at a time, where a single input is not larger."""


class Draw:
    """Seeded draws of the type and on the device of a tensor, made on the CPU."""

    def __init__(self, like: Tensor) -> None:
        self.like, self.generator = like, torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.like)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return (low + (high - low) * torch.rand(shape, generator=self.generator)).to(self.like)

    def power(self, low: float, high: float, *shape: int) -> Tensor:
        """10 to a uniform exponent."""
        return 10 ** self.uniform(low, high, *shape)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator).to(self.like.device)

    def bases(self, value: Tensor, scale: float, count: int) -> Tensor:
        """Inputs of one size: what was traced, constants, ramps, one-hot, sparse and random ones; (count, ...)."""
        shape, size = value.shape[1:], value[0].numel()
        ramp = torch.linspace(-scale, scale, size).to(value)
        hot = value.new_zeros(3, size)
        hot[[0, 1, 2, 2], self.integers(size, 4)] = scale * value.new_tensor([1, -1, 1, 1])
        structured = [torch.zeros_like(ramp)[None], ramp[None], hot, torch.full_like(ramp, scale)[None]]
        rest = scale * self.normal(max(0, count - 8), size)
        rest[::2] *= self.uniform(0, 1, *rest[::2].shape) < 0.3
        near = value[:2].flatten(1) + scale * 1e-2 * self.normal(len(value[:2]), size)
        return torch.cat([near, *structured, rest])[:count].view(-1, *shape)


def deny_where(operator: Operator, claim: str, excess: Tensor, points: Tensor, answers: Tensor) -> None:
    """Refuse with the points (P, M, ...) and answers where the excess (M, ...) is largest, if that is positive."""
    if (found := worst(excess.flatten(1))) is None:
        return
    at, entry = found
    arguments, values = (few(t.flatten(2)[:, at, entry]) for t in (points, answers))
    raise UnsupportedOperator(f"{kind(operator)} claims {claim}, but takes {arguments} to {values}")


def one_hot(value: Tensor, draw: Draw) -> Tensor:
    """Every one-hot input, or as many as there is room for; (M, ...)."""
    size = value[0].numel()
    room = max(8, BUDGET // size)
    numbers = torch.arange(size, device=value.device) if size <= room else draw.integers(size, room)
    hot = value.new_zeros(len(numbers), size)
    hot[torch.arange(len(numbers)), numbers] = 1
    return hot.view(-1, *value.shape[1:])


def deny(operator: Operator, claim: str, excess: Tensor, slack: Tensor | float, x: Tensor) -> None:
    """Refuse where an excess (N, ...) is beyond its slack, with the input (N, ...)."""
    if (found := worst(excess - slack)) is not None:
        example, entry = found
        raise UnsupportedOperator(
            f"{kind(operator)} claims {claim}, which is wrong by {excess[example].flatten()[entry]:.6g} in entry "
            f"{place(torch.tensor(entry), excess.shape[1:])} at the input {few(x[example])}"
        )


def worst(excess: Tensor) -> tuple[int, int] | None:
    """Example and entry of the largest excess, if it is positive; what is NaN is no evidence."""
    flat = excess.flatten(1).nan_to_num(nan=0.0, posinf=0.0)
    if not flat.numel() or flat.amax() <= 0:
        return None
    return divmod(int(flat.argmax()), flat.shape[1])


def noise(answers: Tensor, x: Tensor) -> Tensor:
    """What rounding may do to an answer, by the largest entries there are, (N, 1, ...)."""
    size = largest(answers).flatten() + largest(x).flatten()
    return (64 * torch.finfo(answers.dtype).eps * size + torch.finfo(answers.dtype).tiny).view(
        -1, *[1] * (answers.dim() - 1)
    )


def noise_each(answers: Tensor, points: Tensor) -> Tensor:
    """The same for functions of single entries."""
    return 8 * torch.finfo(answers.dtype).eps * (answers.abs() + points.abs()) + torch.finfo(answers.dtype).tiny


def largest(t: Tensor) -> Tensor:
    """The size of each example by its finite entries, (N, 1, ...)."""
    return t.abs().nan_to_num(nan=0.0, posinf=0.0).flatten(1).amax(1).view(-1, *[1] * (t.dim() - 1))


def kind(operator: Operator) -> str:
    return type(operator).__name__


def place(entry: Tensor | int, shape: Shape) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.as_tensor(entry), shape))


def few(t: Tensor) -> str:
    """The first entries of a tensor."""
    flat = t.flatten()
    return "(" + ", ".join(f"{entry:.6g}" for entry in flat[:6].tolist()) + (", …)" if len(flat) > 6 else ")")
