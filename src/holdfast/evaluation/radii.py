"""Certified radii that are asked for one by one, where a certifier does not search them."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from holdfast.certify import Certificate, Certifier
from holdfast.threat import Threat


def in_vain(columns: Container[str], name: str) -> str | None:
    """The column of a certifier's smallest radius that was asked, or in a search tried, in vain."""
    return next((f"{name}.{what}" for what in ("unproven", "above") if f"{name}.{what}" in columns), None)


def ask_at(
    certifier: Certifier,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    radii: Sequence[float],
    radius: np.ndarray,
    unproven: np.ndarray,
    *,
    broken: np.ndarray | float = np.inf,
    told: Callable[[Tensor, Certificate, float], None] = lambda rows, found, eps: None,
    seed: int = 0,
    batch_size: int = 256,
) -> None:
    """Ask a certifier at further radii, about those examples where what is known leaves them open.

    Args:
        radius, unproven: of each example the largest radius that was verified and the smallest that was asked or
            tried in vain, (N,) float64; what is found is written into them.
        broken: from where on each has a counterexample of the same certifier, which is not asked again, (N,).
        told: of what was asked: the examples' places (M,), what is certified of them, and at which radius.
    """
    for eps in sorted(radius for radius in radii if radius > 0):
        open_ends = (radius < eps) & (eps < unproven)
        unproven[open_ends & (eps >= broken)] = eps
        rows = np.flatnonzero(open_ends & (eps < broken))
        if not len(rows):
            continue
        here = torch.from_numpy(rows).to(x.device)
        found = certifier(model, x[here], y[here], threat.with_eps(eps), seed=seed, batch_size=batch_size)
        told(here, found, eps)
        holds = found.verified.cpu().numpy()
        radius[rows[holds]], unproven[rows[~holds]] = eps, eps
