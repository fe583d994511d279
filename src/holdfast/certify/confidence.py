"""What samples say of a probability: confidence bounds for a fixed number of them, and e-processes for any."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor


def clopper_pearson_lower(successes: Any, trials: Any, alpha: float) -> Any:
    """The one-sided lower confidence bound of a probability, I⁻¹(α; k, n − k + 1), and 0 for k = 0.

    Clopper & Pearson, 1934.

    Args:
        successes, trials: k of n; numbers, arrays or tensors.
        alpha: the bound exceeds the probability at most so often, in (0, 1).

    Returns:
        A float for numbers, otherwise an array or tensor of float64.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie in (0, 1), given {alpha}")
    k, n = np.asarray(successes, dtype=float), np.asarray(trials, dtype=float)
    if (k < 0).any() or (k > n).any() or (n < 1).any():
        raise ValueError(f"expected 0 ≤ successes ≤ trials and trials ≥ 1, given {successes} of {trials}")
    found = np.where(k > 0, special.betaincinv(np.maximum(k, 1), n - k + 1, alpha), 0.0)
    return _like(found, successes)


def smoothing_radius(p_lower: Any, sigma: float) -> Any:
    """σ Φ⁻¹(p) in input units, 0 where p ≤ ½; numbers, arrays or tensors (Cohen et al., 2019, theorem 1)."""
    return _like(sigma * special.ndtri(np.clip(np.asarray(p_lower, dtype=float), 0.5, 1.0)), p_lower)


def _like(found: Any, given: Any) -> Any:
    if isinstance(given, Tensor):
        return torch.from_numpy(np.asarray(found)).to(given.device)
    return found if isinstance(given, np.ndarray) else float(found) if found.ndim == 0 else found


def log_evidence(successes: Any, trials: Any, p0: Any) -> Any:
    """log E_n(p0) of the e-process against p ≤ p0, an array.

    E_n = 1 / (1 − p0) ∫_{p0}^1 (q / p0)^k ((1 − q) / (1 − p0))^(n − k) dq: a supermartingale from 1 for every
    p ≤ p0, so that P(E_n ≥ 1 / α for some n) ≤ α (Ville, 1939), however often one looks.
    """
    k, n, p = np.asarray(successes, dtype=float), np.asarray(trials, dtype=float), np.asarray(p0, dtype=float)
    misses = n - k
    with np.errstate(divide="ignore"):  # far below p0 the integral underflows, and there is no evidence
        tail = np.log(special.betaincc(k + 1, misses + 1, p))
    return special.betaln(k + 1, misses + 1) + tail - np.log1p(-p) - k * np.log(p) - misses * np.log1p(-p)


def anytime_lower(successes: int, trials: int, alpha: float) -> float:
    """The largest p0 with E_n(p0) ≥ 1 / α, by bisection from below; 0 where there is none."""
    low, high = 0.0, successes / trials if trials else 0.0
    if high == 0 or log_evidence(successes, trials, 1e-12) < -math.log(alpha):
        return 0.0
    low = 1e-12
    for _ in range(60):
        middle = (low + high) / 2
        if middle < 1 and log_evidence(successes, trials, middle) >= -math.log(alpha):
            low = middle
        else:
            high = middle
    return low
