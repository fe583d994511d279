"""From the per-example table to accuracies with counts and intervals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
from scipy.stats import binomtest

from holdfast.evaluation.accuracy import certified, names, radius_known, stands
from holdfast.threat import Threat


def proportion_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson, 1927); (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    interval = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def summarise(
    table: pd.DataFrame, threat: Threat, guarantees: dict[str, str], seconds: dict[str, float]
) -> dict[str, Any]:
    """The accuracies of an evaluation's table, each a fraction of all its examples."""
    attacks, certifiers = names(table, "success"), names(table, "verified")
    eps = threat.eps
    counts: dict[str, Any] = {
        "standard": int(table["correct"].sum()),
        "attacked": {name: int(stands(table, eps, eps, name).sum()) for name in attacks},
        "certified": {name: int(certified(table, name, eps).sum()) for name in certifiers},
    }
    if "not_surely_wrong" in table:
        counts["not_surely_wrong"] = int(table["not_surely_wrong"].sum())
    proven = [certified(table, name, eps) for name in certifiers if guarantees[name] != "estimate"]
    bracket = {
        "certified": int(pd.concat(proven, axis=1).any(axis=1).sum()) if proven else None,
        "attacked": int(stands(table, eps, eps).sum()) if attacks else None,
    }
    passes = {
        name: {key: int(table[f"{name}.{key}"].sum()) for key in ("attacked", "forwards", "backwards")}
        for name in attacks
        if f"{name}.attacked" in table
    }
    sampled = {name: table[f"{name}.samples"] for name in certifiers if f"{name}.samples" in table}
    sampling = {
        name: {"samples": float(spent.mean()), "abstained": float(table[f"{name}.abstained"].mean())}
        for name, spent in sampled.items()
    }
    return {
        "examples": len(table),
        "threat": str(threat),
        **_each(counts, lambda count: count / len(table)),
        "bracket": _each(bracket, lambda count: count / len(table)),
        "bracket_guarantee": joint_guarantee(guarantees),
        "counts": {**counts, "bracket": bracket},
        "intervals": _each(counts, lambda count: proportion_interval(count, len(table))),
        "guarantees": guarantees,
        "passes": passes,
        **({"sampling": sampling} if sampling else {}),
        "seconds": sum(seconds.values()),
        "timings": seconds,
    }


def joint_guarantee(guarantees: dict[str, str]) -> str | None:
    """What holds of all certificates of an example together: the errors of probabilistic ones add up.

    None where nothing but estimates, or nothing at all, was made.
    """
    proofs = [guarantee for guarantee in guarantees.values() if guarantee != "estimate"]
    if not proofs:
        return None
    alphas = [float(text.removeprefix("probabilistic(").rstrip(")")) for text in proofs if text != "deterministic"]
    return f"probabilistic({min(1.0, sum(alphas)):g})" if alphas else "deterministic"


def certified_at(
    table: pd.DataFrame, threat: Threat, radii: list[float], *, partial: bool = False
) -> dict[str, dict[str, float | None]]:
    """For each certifier the certified accuracy at each radius, by the threat's text, and the ``mean radius``.

    An example counts where it is right and its certified radius is at least the given one; at the evaluation's own
    eps that is its certified accuracy, at 0 its standard accuracy. The mean radius takes 0 where the prediction is
    wrong, is inf where nothing in the box changes some example, and None where a certifier was asked at some
    radii only, so that its ``radius`` is but the largest of those it verified.

    Args:
        partial: None, too, at a radius that a certifier was not asked about, as where the time was up.

    Raises:
        ValueError: a certifier was not asked about a radius and its answers at others leave it open; sequential
            smoothing without a tolerance knows eps only.
    """
    found: dict[str, dict[str, float | None]] = {}
    for name in names(table, "verified"):
        found[name] = {
            str(threat.with_eps(r)): None
            if partial and not radius_known(table, name, r)
            else float(certified(table, name, r).mean())
            for r in radii
        }
        radius = table[f"{name}.radius"].where(table["correct"], 0)
        found[name]["mean radius"] = None if f"{name}.unproven" in table else float(radius.mean())
    return found


def _each(counts: Any, function: Callable[[int], Any]) -> Any:
    """The function of every count in a nested dictionary; None stays None."""
    if isinstance(counts, dict):
        return {key: _each(value, function) for key, value in counts.items()}
    return None if counts is None else function(counts)
