"""The nearest-neighbour classifier, whose margins are certificates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from holdfast.norms import NORMS

PORTION = 2**26
"""Numbers that the distances of one portion of inputs to one class may take, coordinates counted."""


class NearestNeighbour(nn.Module):
    """z_c = −min over the examples x_j of class c of ‖x − x_j‖: the proof of concept of Yang et al. (2020).

    Every logit is 1-Lipschitz in the norm, and on data whose classes are more than 2 eps apart the classifier is
    right on every ball of radius eps around its examples.

    Args:
        x: examples, (N, ...), floating.
        y: their labels, (N,), each of 0..K−1 at least once.
        norm: ``linf``, ``l2`` or ``l1``.
    """

    points: Tensor
    labels: Tensor

    def __init__(self, x: Tensor, y: Tensor, norm: str = "linf") -> None:
        super().__init__()
        if norm not in ("linf", "l2", "l1"):
            raise ValueError(f"expected the norm linf, l2 or l1, given {norm!r}")
        if len(x) != len(y) or not len(y) or y.min() < 0 or not (y.bincount() > 0).all():
            raise ValueError(f"expected {len(x)} labels that use every class 0..K-1, given {tuple(y.shape)}")
        self.norm = norm
        order = y.argsort(stable=True)
        self.register_buffer("points", x[order].detach().clone())
        self.register_buffer("labels", y[order].clone())
        self._ends = [0, *y.bincount().cumsum(0).tolist()]

    def forward(self, x: Tensor) -> Tensor:
        flat, points = x.flatten(1), self.points.flatten(1)
        with torch.no_grad():
            nearest = torch.stack([self.nearest(flat, points, c) for c in range(len(self._ends) - 1)], 1)
        lengths = [NORMS[self.norm].length(flat - points[column]) for column in nearest.unbind(1)]
        return -torch.stack(lengths, 1)

    def nearest(self, x: Tensor, points: Tensor, label: int) -> Tensor:
        """The number of the nearest example of a class, (n,)."""
        first, stop = self._ends[label : label + 2]
        order = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}[self.norm]
        rivals = points[first:stop]
        exact = "donot_use_mm_for_euclid_dist"
        portion = max(1, PORTION // rivals.numel())
        return first + torch.cat([torch.cdist(q, rivals, order, exact).argmin(1) for q in x.split(portion)])
