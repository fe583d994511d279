"""The two accuracies of the sandwich at any radius, from the per-example table: the one definition of each.

Table, summary, curve, studies and reports all call these. At radius 0 both are the standard accuracy, and an
example that is wrong as it is counts at no radius.
"""

from __future__ import annotations

import numpy as np
import pandas as pd


def names(table: pd.DataFrame, column: str) -> list[str]:
    """The attacks (``column="success"``) or certifiers (``"verified"``) that a table reports on."""
    return [name.removesuffix(f".{column}") for name in table.columns if name.endswith(f".{column}")]


def certified(table: pd.DataFrame, name: str, radius: float) -> pd.Series:
    """Right, and certified by ``name`` up to this radius or a larger one, (N,) bool.

    Raises:
        ValueError: the certifier never answered about this radius, which lies between what it verified and what it
            was asked in vain (see ``radius_known``).
    """
    if not radius_known(table, name, radius):
        raise ValueError(
            f"{name} was not asked about radius {radius:g}, and the radii that it verified do not answer it: "
            "evaluate with radii=[...], or evaluation.radii in a recipe; smoothing with mode=fixed or a tolerance"
        )
    reaches = table[f"{name}.radius"] >= radius if radius > 0 else True
    return table["correct"] & reaches


def radius_known(table: pd.DataFrame, name: str, radius: float) -> bool:
    """Whether the table says of every right example if ``name`` certifies it at this radius."""
    if radius <= 0 or f"{name}.unproven" not in table:
        return True
    between = (table[f"{name}.radius"] < radius) & (radius < table[f"{name}.unproven"])
    return not bool((table["correct"] & between).any())


def broken_from(table: pd.DataFrame, eps: float, name: str | None = None) -> np.ndarray:
    """The smallest radius at which each example counts as broken by this attack, or by any, (N,) float64.

    The distance of the adversarial example; eps, where it counts as within the threat set but lies a hair farther,
    as attacks round. 0 where the example is wrong as it is, inf where nothing was found. What was found within a
    certified radius, and is no contradiction (see ``evaluation.alarm``), is an error of float32 where the network
    that the certificate speaks of is right: it counts from beyond that radius.
    """
    smallest = np.full(len(table), np.inf)
    for attack in names(table, "success") if name is None else [name]:
        distance = table[f"{attack}.distance"].to_numpy().astype(float)
        inside = table[f"{attack}.success"].to_numpy()
        smallest = np.minimum(smallest, np.where(inside, np.minimum(distance, eps), distance))
    for certifier in names(table, "verified"):
        radius = table[f"{certifier}.radius"].to_numpy()
        smallest = np.where(smallest <= radius, np.nextafter(radius, np.inf), smallest)
    return np.where(table["correct"], smallest, 0.0)


def stands(table: pd.DataFrame, eps: float, radius: float, name: str | None = None) -> pd.Series:
    """Right, and not broken within this radius by the attack, or by any, (N,) bool.

    Args:
        eps: of the threat that was attacked.
    """
    return table["correct"] & ((broken_from(table, eps, name) > radius) | (radius <= 0))
