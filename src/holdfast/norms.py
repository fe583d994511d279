"""The norms of threats: length, projection, steepest and shortest directions, random points."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from holdfast.draws import Draws

WIDER = 1 + 2.0**-50
"""What a few roundings in float64 may take from a number."""


class Norm(Protocol):
    """What a threat asks of its norm; differences are rows, (n, d)."""

    @staticmethod
    def length(delta: Tensor) -> Tensor:
        """‖δ‖, (n,)."""

    @staticmethod
    def dual_length(gradient: Tensor) -> Tensor:
        """The largest ⟨g, δ⟩ over ‖δ‖ ≤ 1, (n,)."""

    @staticmethod
    def project(delta: Tensor, eps: Tensor | float, room: Callable[[Tensor], Tensor]) -> Tensor:
        """A point of the ball of radius eps, one or (n, 1); ``room`` tells how far each entry may go in its
        direction."""

    @staticmethod
    def steepest(gradient: Tensor, movable: Callable[[], Tensor], share: float) -> Tensor:
        """The δ of length 1 with the largest ⟨g, δ⟩; where that is one entry, spread over a share of them. It is
        zero for a zero gradient."""

    @staticmethod
    def shortest(weight: Tensor, gap: Tensor, room: Tensor) -> Tensor:
        """The shortest δ ≥ 0 within the room with Σ weight · δ = gap, weights and gap ≥ 0."""

    @staticmethod
    def support(weight: Tensor, eps: Tensor, room: Tensor) -> Tensor:
        """The most that Σ weight · δ can be for 0 ≤ δ ≤ room, ‖δ‖ ≤ eps (n, 1), weights ≥ 0; (n,)."""

    @staticmethod
    def euclidean_radius(dimensions: int) -> float:
        """The largest l_2 length in the unit ball."""

    @staticmethod
    def uniform(draws: Draws, count: int) -> Tensor:
        """A uniform point of the unit ball in so many dimensions for each, (n, count)."""

    @staticmethod
    def largest(draws: Draws, count: int) -> Tensor:
        """A random point of the unit sphere, likewise."""

    @staticmethod
    def box_radius(dimensions: int, width: float) -> float:
        """At least the largest distance within a cube of this width, which may have been rounded."""

    @staticmethod
    def reach(eps: Tensor) -> Tensor:
        """How far a single entry can go in a ball of radius eps."""


class Linf:
    @staticmethod
    def length(delta: Tensor) -> Tensor:
        return delta.abs().amax(1)

    @staticmethod
    def dual_length(gradient: Tensor) -> Tensor:
        return gradient.abs().sum(1)

    @staticmethod
    def project(delta: Tensor, eps: Tensor | float, room: Callable[[Tensor], Tensor]) -> Tensor:
        return delta.clamp(-eps, eps)  # type: ignore[arg-type]

    @staticmethod
    def support(weight: Tensor, eps: Tensor, room: Tensor) -> Tensor:
        return (weight * torch.minimum(room, eps)).sum(1)

    @staticmethod
    def euclidean_radius(dimensions: int) -> float:
        return math.sqrt(dimensions)

    @staticmethod
    def shortest(weight: Tensor, gap: Tensor, room: Tensor) -> Tensor:
        return _water_level(weight, torch.ones_like(weight), gap, room)

    @staticmethod
    def largest(draws: Draws, count: int) -> Tensor:
        return draws.bits(count).bitwise_right_shift(31).mul_(2).add_(1).float()

    @staticmethod
    def reach(eps: Tensor) -> Tensor:
        return eps

    @staticmethod
    def steepest(gradient: Tensor, movable: Callable[[], Tensor], share: float) -> Tensor:
        return gradient.sign()

    @staticmethod
    def uniform(draws: Draws, count: int) -> Tensor:
        return draws.signed(count)

    @staticmethod
    def box_radius(dimensions: int, width: float) -> float:
        return width * WIDER


class L2:
    @staticmethod
    def length(delta: Tensor) -> Tensor:
        return delta.norm(dim=1)

    @staticmethod
    def dual_length(gradient: Tensor) -> Tensor:
        return gradient.norm(dim=1)

    @staticmethod
    def project(delta: Tensor, eps: Tensor | float, room: Callable[[Tensor], Tensor]) -> Tensor:
        length = delta.norm(dim=1, keepdim=True)
        return torch.where(length > eps, delta * (eps / length), delta)

    @staticmethod
    def support(weight: Tensor, eps: Tensor, room: Tensor, rounds: int | None = None) -> Tensor:
        """By the dual, min over ν > 0 of Σ [w δ − ν δ²/2] + ν eps²/2 at δ = min(w/ν, room): every ν gives a bound.

        1/ν is the λ at which min(λ w, room) has length eps. From λ = 0 it climbs: entries beyond their room
        are fixed there, and the rest is stretched to the length that is left.

        Args:
            rounds: of the climb, made without asking whether it has arrived.
        """
        # In units of the largest weight, whose square neither vanishes nor overflows.
        scale = weight.detach().amax(1, keepdim=True)
        weight = weight / torch.where(scale > 0, scale, 1)
        # And of eps, for the same reason.
        unit = torch.where((eps > 0) & eps.isfinite(), eps, 1)
        scale, eps = scale * unit, eps / unit
        space = (room / unit).nan_to_num(posinf=torch.finfo(room.dtype).max)
        with torch.no_grad():
            free, level = torch.ones_like(weight, dtype=torch.bool), torch.zeros_like(eps)
            squares, rooms = weight.square(), space.square()
            for _ in range(rounds or 100):
                spare = eps.square() - torch.where(free, 0, rooms).sum(1, keepdim=True)
                slope = torch.where(free, squares, 0).sum(1, keepdim=True)
                level = torch.maximum(level, (spare.clamp(min=0) / torch.where(slope > 0, slope, 1)).sqrt())
                level = torch.where(slope > 0, level, 0)
                beyond = free & (level * weight > space)
                if rounds is None and not beyond.any():
                    break
                free = free & ~beyond
            # Where the whole room lies inside the ball there is no λ, and the room is the answer.
            within = torch.where(weight > 0, rooms, 0).sum(1, keepdim=True) <= eps.square()
            nu = 1 / torch.where(level > 0, level, 1e-30)
        delta = torch.minimum(weight / nu, space)
        dual = (weight * delta - nu * delta.square() / 2).sum(1, keepdim=True) + nu * eps.square() / 2
        corner = (weight * space).sum(1, keepdim=True)
        return (scale * torch.where(within, corner, dual)).squeeze(1)

    @staticmethod
    def euclidean_radius(dimensions: int) -> float:
        return 1.0

    @staticmethod
    def shortest(weight: Tensor, gap: Tensor, room: Tensor) -> Tensor:
        return _water_level(weight, weight, gap, room)

    @staticmethod
    def largest(draws: Draws, count: int) -> Tensor:
        direction = draws.normal(count).double()
        return direction / direction.norm(dim=1, keepdim=True)

    @staticmethod
    def reach(eps: Tensor) -> Tensor:
        return eps

    @staticmethod
    def steepest(gradient: Tensor, movable: Callable[[], Tensor], share: float) -> Tensor:
        # Scaled by its largest entry first, so that the squares of tiny gradients do not underflow.
        largest = gradient.abs().amax(1, keepdim=True)
        scaled = gradient / largest.where(largest > 0, torch.ones_like(largest))
        length = scaled.norm(dim=1, keepdim=True)
        return scaled / length.where(length > 0, torch.ones_like(length))

    @staticmethod
    def uniform(draws: Draws, count: int) -> Tensor:
        radius = draws.uniform(1, at=count + count % 2).double() ** (1 / max(count, 1))
        return radius * L2.largest(draws, count)

    @staticmethod
    def box_radius(dimensions: int, width: float) -> float:
        return width * math.sqrt(dimensions) * WIDER


class L1:
    @staticmethod
    def length(delta: Tensor) -> Tensor:
        return delta.abs().sum(1)

    @staticmethod
    def dual_length(gradient: Tensor) -> Tensor:
        return gradient.abs().amax(1)

    @staticmethod
    def project(delta: Tensor, eps: Tensor | float, room: Callable[[Tensor], Tensor]) -> Tensor:
        """The nearest point of ball ∩ box: |d| = min(max(|u| − λ, 0), room), with the λ ≥ 0 that leaves length eps.

        That length falls with λ in straight pieces between |u| − room and |u|, where each entry begins
        and ceases to shrink.
        """
        magnitude = delta.abs().double()
        space = torch.where(delta != 0, room(delta), 0).double()
        begins, ends = (magnitude - space).clamp(min=0), magnitude
        change = torch.cat([-torch.ones_like(begins), torch.ones_like(ends)], 1)
        level, order = torch.cat([begins, ends], 1).sort(dim=1)
        slope = change.gather(1, order).cumsum(1)
        whole = torch.minimum(magnitude, space).sum(1, keepdim=True)
        fall = (slope[:, :-1] * level.diff(dim=1)).cumsum(1)
        length = whole + torch.cat([torch.zeros_like(whole), fall], 1)  # at each level; 0 at the last
        piece = ((length > eps).sum(1, keepdim=True) - 1).clamp(min=0)
        excess = length.gather(1, piece) - eps
        at = level.gather(1, piece) - excess / slope.gather(1, piece).clamp(max=-1)
        at = torch.where(whole > eps, at, 0)
        nearest = torch.minimum((magnitude - at).clamp(min=0), space)
        nearest = nearest * (eps / nearest.sum(1, keepdim=True).clamp(min=1e-300)).clamp(max=1)  # rounding
        return (delta.sign() * nearest).to(delta)

    @staticmethod
    def support(weight: Tensor, eps: Tensor, room: Tensor) -> Tensor:
        """The room of the largest weights is used up first, to the level of the weight at which it is.

        Every level λ ≥ 0 gives a bound, λ eps + Σ max(w − λ, 0) room, and that one the least.
        """
        ordered, order = weight.sort(dim=1, descending=True)
        space = torch.minimum(room.gather(1, order), eps)
        short = space.cumsum(1) < eps
        last = short.sum(1, keepdim=True).clamp(max=weight.shape[1] - 1)
        level = torch.where(short.all(1, keepdim=True), 0, ordered.gather(1, last))
        return (level * eps).squeeze(1) + ((ordered - level).clamp(min=0) * space).sum(1)

    @staticmethod
    def euclidean_radius(dimensions: int) -> float:
        return 1.0

    @staticmethod
    def shortest(weight: Tensor, gap: Tensor, room: Tensor) -> Tensor:
        """The entries of largest weight are filled one after the other."""
        ordered, order = weight.sort(dim=1, descending=True)
        gain = ordered * room.gather(1, order).clamp(max=torch.finfo(weight.dtype).max / weight.shape[1])
        before = gain.nan_to_num().cumsum(1) - gain
        missing = (gap[:, None] - before).clamp(min=0)
        step = torch.minimum(missing / ordered.clamp(min=1e-30), room.gather(1, order))
        return torch.zeros_like(step).scatter(1, order, torch.where(ordered > 0, step, 0))

    @staticmethod
    def largest(draws: Draws, count: int) -> Tensor:
        direction = draws.normal(count).double()
        return direction / direction.abs().sum(1, keepdim=True)

    @staticmethod
    def reach(eps: Tensor) -> Tensor:
        return eps

    @staticmethod
    def steepest(gradient: Tensor, movable: Callable[[], Tensor], share: float) -> Tensor:
        magnitude, count = gradient.abs() * movable(), int(share * gradient.shape[1])
        largest = magnitude.topk(count, dim=1).indices if count > 1 else magnitude.argmax(1, keepdim=True)
        step = gradient.gather(1, largest).sign() * (magnitude.gather(1, largest) > 0)
        return torch.zeros_like(gradient).scatter(1, largest, step / step.abs().sum(1, keepdim=True).clamp(min=1))

    @staticmethod
    def uniform(draws: Draws, count: int) -> Tensor:
        # d exponential variables over the sum of d + 1 of them are uniform in the positive simplex.
        length = draws.exponential(count + 1).double()
        sign = Linf.largest(draws, 2 * count + 1)[:, count + 1 :]
        return sign * length[:, :count] / length.sum(1, keepdim=True)

    @staticmethod
    def box_radius(dimensions: int, width: float) -> float:
        return width * dimensions * WIDER


class L0:
    @staticmethod
    def length(delta: Tensor) -> Tensor:
        return (delta != 0).sum(1).to(delta)

    @staticmethod
    def dual_length(gradient: Tensor) -> Tensor:
        return gradient.abs().amax(1)

    @staticmethod
    def project(delta: Tensor, eps: Tensor | float, room: Callable[[Tensor], Tensor]) -> Tensor:
        """The entries of largest size stay."""
        rank = delta.abs().argsort(dim=1, descending=True).argsort(dim=1)
        return delta * (rank < eps)

    @staticmethod
    def steepest(gradient: Tensor, movable: Callable[[], Tensor], share: float) -> Tensor:
        raise ValueError("l0 balls have no steepest direction; attack them with fmn or sigma-zero")

    @staticmethod
    def support(weight: Tensor, eps: Tensor, room: Tensor) -> Tensor:
        """The entries that gain most."""
        gain = torch.where(weight > 0, weight * room, 0).sort(dim=1, descending=True).values
        return (gain * (torch.arange(gain.shape[1], device=gain.device) < eps.floor())).sum(1)

    @staticmethod
    def euclidean_radius(dimensions: int) -> float:
        raise ValueError("l0 balls have no finite l_2 radius; certify them by the box: ibp or crown")

    @staticmethod
    def shortest(weight: Tensor, gap: Tensor, room: Tensor) -> Tensor:
        """The entries that gain most are filled one after the other."""
        room = room.clamp(max=torch.finfo(weight.dtype).max / weight.shape[1] / weight.amax().clamp(min=1).item())
        gain, order = (weight * room).sort(dim=1, descending=True)
        missing = (gap[:, None] - (gain.cumsum(1) - gain)).clamp(min=0)
        weight, room = weight.gather(1, order), room.gather(1, order)
        step = torch.minimum(missing / weight.clamp(min=1e-30), room)
        return torch.zeros_like(step).scatter(1, order, torch.where(weight > 0, step, 0))

    @staticmethod
    def uniform(draws: Draws, count: int) -> Tensor:
        raise ValueError("l0 balls have no uniform distribution; attack them with fmn or sigma-zero")

    @staticmethod
    def largest(draws: Draws, count: int) -> Tensor:
        raise ValueError("l0 balls have no uniform distribution; attack them with fmn or sigma-zero")

    @staticmethod
    def box_radius(dimensions: int, width: float) -> float:
        return float(dimensions)

    @staticmethod
    def reach(eps: Tensor) -> Tensor:
        return torch.where(eps >= 1, torch.inf, 0.0)  # one entry may go anywhere


def _water_level(weight: Tensor, speed: Tensor, gap: Tensor, room: Tensor) -> Tensor:
    """min(λ · speed, room) with the λ ≥ 0 at which Σ weight · min(λ · speed, room) is the gap, or all the room.

    The sum is concave and in straight pieces, so Newton's steps from 0 climb to λ without passing it.
    """
    level, pull = torch.zeros_like(gap)[:, None], weight * speed
    space = room.nan_to_num(posinf=torch.finfo(room.dtype).max)
    for _ in range(50):
        step = level * speed
        filled = torch.minimum(step, space)
        missing = gap[:, None] - (weight * filled).sum(1, keepdim=True)
        # 1 where there is room left, 0 elsewhere: faster than to compare.
        slope = filled.neg_().add_(space).sign_().mul_(pull).sum(1, keepdim=True)
        climbing = (missing > 1e-6 * gap[:, None]) & (slope > 0)
        if not climbing.any():
            break
        level = level + torch.where(climbing, missing / slope, 0)
    exhausted = (slope <= 0) & (missing > 0)
    if exhausted.any():
        step = torch.where(exhausted & (weight > 0), torch.inf, step)
    return torch.minimum(step, room)


NORMS: dict[str, type[Norm]] = {"linf": Linf, "l2": L2, "l1": L1, "l0": L0}
