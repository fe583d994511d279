"""The geometry of class means: which is nearest, how two sets of them lie, how near a simplex they are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def nearest_centre(features: Tensor, centres: Tensor) -> Tensor:
    """The class of the nearest centre of each example, (N,); centres that are NaN are none.

    Args:
        features: (N, d).
        centres: (C, d), such as clean class means.
    """
    known = torch.isfinite(centres).all(1).nonzero().squeeze(1)
    middle = centres[known].mean(0)  # ‖x − μ‖² = ‖x‖² − 2 ⟨x, μ⟩ + ‖μ‖², from where neither is large
    points, others = features.to(centres) - middle, centres[known] - middle
    return known[(points @ others.T - 0.5 * others.square().sum(1)).argmax(1)]


def leap_matrix(features: Tensor, labels: Tensor, centres: Tensor) -> Tensor:
    """How many examples of each class (row) lie nearest to each clean centre (column), (C, C) int64."""
    classes = len(centres)
    places = labels * classes + nearest_centre(features, centres)
    return torch.bincount(places, minlength=classes * classes).view(classes, classes)


@dataclass(frozen=True)
class SimplexComparison:
    """How two sets of class means lie to each other."""

    distance: Tensor
    """‖μ_c − μ'_c‖ of means from which the mean of the class means was subtracted, (C,)."""
    angle: Tensor
    """The angle between these, (C,), in radians."""
    distance_uncentred: Tensor
    angle_uncentred: Tensor
    global_distance: float
    """Between the means of the class means."""
    global_angle: float


def compare_simplices(means: Tensor, others: Tensor) -> SimplexComparison:
    """Compare class means (C, d) with those of other data, such as clean with adversarial; NaN where either lacks a
    class."""
    means, others = means.double(), others.double()
    both = torch.isfinite(means).all(1) & torch.isfinite(others).all(1)
    middle, other = means[both].mean(0), others[both].mean(0)
    first, second = means - middle, others - other
    return SimplexComparison(
        (first - second).norm(dim=1),
        angle_between(first, second),
        (means - others).norm(dim=1),
        angle_between(means, others),
        (middle - other).norm().item(),
        angle_between(middle[None], other[None]).item(),
    )


def angle_between(a: Tensor, b: Tensor) -> Tensor:
    """The angle of rows (n, d), in radians: exact also near 0 and π, where the arc cosine rounds to NaN (Kahan)."""
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    return 2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1))


def etf_error(gram: Tensor) -> float:
    """‖G / ‖G‖_F − (I − 1 1ᵀ / C) / √(C − 1)‖_F of a Gram matrix (C, C): 0 for a simplex."""
    number = len(gram)
    simplex = torch.eye(number, dtype=gram.dtype, device=gram.device) - 1 / number
    return (gram / gram.norm() - simplex / math.sqrt(number - 1)).norm().item()


def variation(values: Tensor, unbiased: bool = True) -> float:
    """Standard deviation over mean."""
    return (values.std(correction=int(unbiased)) / values.mean()).item()


def equiangle(rows: Tensor) -> float:
    """Mean over pairs of |cos + 1 / (C − 1)|."""
    number = len(rows)
    unit = F.normalize(rows, dim=1)
    cosines = (unit @ unit.T)[~torch.eye(number, dtype=torch.bool, device=rows.device)]
    return (cosines + 1 / (number - 1)).abs().mean().item()
