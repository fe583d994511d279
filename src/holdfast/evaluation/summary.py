"""From the per-example table to accuracies with counts and intervals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
from scipy.stats import binomtest

from holdfast.threat import Threat


def proportion_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson, 1927); (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    interval = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def names(table: pd.DataFrame, column: str) -> list[str]:
    """The attacks (``column="success"``) or certifiers (``"verified"``) that a table reports on."""
    return [name.removesuffix(f".{column}") for name in table.columns if name.endswith(f".{column}")]


def broken_by_any(table: pd.DataFrame) -> pd.Series:
    """Wrong, or broken by some attack inside the threat set."""
    return table[[f"{name}.success" for name in names(table, "success")]].any(axis=1) | ~table["correct"]


def summarise(
    table: pd.DataFrame, threat: Threat, guarantees: dict[str, str], seconds: dict[str, float]
) -> dict[str, Any]:
    """The accuracies of an evaluation's table, each a fraction of all its examples."""
    attacks, certifiers = names(table, "success"), names(table, "verified")
    counts: dict[str, Any] = {
        "standard": int(table["correct"].sum()),
        "attacked": {name: int((~table[f"{name}.success"]).sum()) for name in attacks},
        "certified": {name: int(table[f"{name}.verified"].sum()) for name in certifiers},
    }
    proven = [f"{name}.verified" for name in certifiers if guarantees[name] != "estimate"]
    bracket = {
        "certified": int(table[proven].any(axis=1).sum()) if proven else None,
        "attacked": int((~broken_by_any(table)).sum()) if attacks else None,
    }
    passes = {
        name: {key: int(table[f"{name}.{key}"].sum()) for key in ("attacked", "forwards", "backwards")}
        for name in attacks
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
        "counts": {**counts, "bracket": bracket},
        "intervals": _each(counts, lambda count: proportion_interval(count, len(table))),
        "guarantees": guarantees,
        "passes": passes,
        **({"sampling": sampling} if sampling else {}),
        "seconds": sum(seconds.values()),
        "timings": seconds,
    }


def certified_at(table: pd.DataFrame, threat: Threat, radii: list[float]) -> dict[str, dict[str, float]]:
    """For each certifier the certified accuracy at each radius, by the threat's text, and the mean radius.

    An example counts where its certified radius exceeds the given one. The mean radius takes 0 where the
    prediction is wrong, and is inf where nothing in the box changes some example.
    """
    found: dict[str, dict[str, float]] = {}
    for name in names(table, "verified"):
        radius = table[f"{name}.radius"]
        found[name] = {str(threat.with_eps(r)): float((radius > r).mean()) for r in radii}
        found[name]["mean radius"] = float(radius.mean())
    return found


def _each(counts: Any, function: Callable[[int], Any]) -> Any:
    """The function of every count in a nested dictionary; None stays None."""
    if isinstance(counts, dict):
        return {key: _each(value, function) for key, value in counts.items()}
    return None if counts is None else function(counts)
