"""Confidence bounds and e-processes: reference values, and error rates by simulation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import Tensor

from holdfast.certify import clopper_pearson_lower, smoothing_radius
from holdfast.certify.confidence import anytime_lower, log_evidence


def test_clopper_pearson_and_radii(reference: Callable[[str], dict[str, Tensor]]) -> None:
    arrays = reference("intriguing_smoothing")
    counts = arrays["cp_k_n"].double()
    for column, alpha in enumerate(arrays["cp_alphas"].tolist()):
        lower = clopper_pearson_lower(counts[:, 0], counts[:, 1], alpha)
        assert torch.allclose(lower, arrays["cp_lower"][:, column].double(), rtol=0, atol=1e-12)
        expected = arrays["cp_radius_over_sigma"][:, column].double().nan_to_num(0)
        assert torch.allclose(smoothing_radius(lower, 0.5), 0.5 * expected, rtol=1e-9, atol=1e-12)
    assert clopper_pearson_lower(100_000, 100_000, 0.001) == pytest.approx(0.001 ** (1 / 100_000))
    assert clopper_pearson_lower(0, 10, 0.05) == 0
    assert isinstance(clopper_pearson_lower(np.array([5]), 10, 0.05), np.ndarray)
    assert smoothing_radius(0.4, 1.0) == 0
    assert smoothing_radius(1.0, 1.0) == math.inf


@pytest.mark.parametrize(("k", "n", "alpha"), [(5, 4, 0.1), (-1, 4, 0.1), (1, 0, 0.1), (1, 2, 0.0), (1, 2, 1.0)])
def test_nonsense_is_refused(k: int, n: int, alpha: float) -> None:
    with pytest.raises(ValueError, match=r"expected|alpha"):
        clopper_pearson_lower(k, n, alpha)


@pytest.mark.parametrize(
    ("k", "n", "p0"), [(0, 0, 0.7), (3, 3, 0.6), (50, 60, 0.7), (10, 60, 0.5), (900, 1000, 0.84)]
)
def test_evidence_is_the_integral_of_its_definition(k: int, n: int, p0: float) -> None:
    def integrand(q: float) -> float:
        misses = (n - k) * math.log((1 - q) / (1 - p0)) if n > k else 0.0
        return math.exp(k * math.log(q / p0) + misses)

    expected = integrate.quad(integrand, p0, 1, points=[max(p0, k / max(n, 1))] if k < n else None)[0] / (1 - p0)
    assert float(log_evidence(k, n, p0)) == pytest.approx(math.log(expected), abs=1e-6)


def test_evidence_is_a_martingale_at_p0_and_falls_below() -> None:
    for p in (0.7, 0.6):
        for k, n in [(0, 0), (6, 8), (30, 50)]:
            now, hit, miss = (math.exp(log_evidence(a, b, 0.7)) for a, b in [(k, n), (k + 1, n + 1), (k, n + 1)])
            following = p * hit + (1 - p) * miss
            assert following == pytest.approx(now) if p == 0.7 else following < now


@pytest.mark.parametrize("p", [0.55, 0.69, 0.95])
def test_error_rates_over_thousands_of_runs(p: float) -> None:
    """A true p is claimed to be exceeded at most as often as alpha says, also when one looks after every sample."""
    alpha, runs, samples = 0.05, 2000, 400
    draws = np.random.default_rng(0).random((runs, samples)) < p
    hits, trials = draws.cumsum(1), np.arange(1, samples + 1)
    fixed = clopper_pearson_lower(hits[:, -1], samples, alpha) > p
    ever = (log_evidence(hits, trials, p) >= -math.log(alpha)).any(1)
    slack = 3 * math.sqrt(alpha * (1 - alpha) / runs)
    assert fixed.mean() <= alpha + slack
    assert ever.mean() <= alpha + slack
    assert ever.mean() > 0.2 * alpha  # it is not merely silent
    # Looking after every sample with the bound for a fixed number is what breaks the promise.
    assert (clopper_pearson_lower(hits, np.broadcast_to(trials, hits.shape), alpha) > p).any(1).mean() > 2 * alpha


def test_the_anytime_bound_is_where_the_evidence_crosses() -> None:
    for k, n in [(90, 100), (100, 100), (600, 1000)]:
        bound = anytime_lower(k, n, 0.001)
        assert 0 < bound < clopper_pearson_lower(k, n, 0.001)
        assert float(log_evidence(k, n, bound)) >= math.log(1000) - 1e-6
        assert float(log_evidence(k, n, bound + 1e-6)) < math.log(1000)
    assert anytime_lower(0, 0, 0.1) == 0
    assert anytime_lower(0, 50, 0.1) == 0
