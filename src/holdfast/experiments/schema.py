"""The form in which recipes are stored: its number, and how older forms are brought up to it. Without torch.

A new setting with a default needs nothing here. A default that changes, a setting that is renamed or removed raises
``SCHEMA`` and adds an upgrade that writes out what older recipes meant. A change of the code that alters weights or
answers under equal settings raises ``SCHEMA``, and with it the number below that it concerns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

SCHEMA = 5
"""1: version 0.1, whole recipes in ``experiment.yaml``, beside the result of the one evaluation. 2: settings that
are not the defaults in ``recipe.yaml``, evaluations in folders of their own. 3: smoothing draws its noise on a grid
(``grid_bits``); certificates account for their own rounding, and an attack's successes for that of the network;
``audit`` is a share of the passes. 4: what an example draws is a hash of seed, example and number; the ladder is
the attack that is run where nobody chose one, which was pgd. 5: losses by Lipschitz constants go on from the step
before's singular vectors; S-shaped functions are bounded by tangents, and the ladder starts far away and often, so
that Square needs no warm start (``warm``)."""
TRAINS_ALIKE_SINCE = 5
"""The schema since which equal settings give equal weights."""
ANSWERS_ALIKE_SINCE = 5
"""The schema since which equal settings give equal evaluations."""


def _from_1(recipe: dict[str, Any]) -> dict[str, Any]:
    """All settings stand there, and the names of all of them are still theirs."""
    return recipe


def _from_2(recipe: dict[str, Any]) -> dict[str, Any]:
    """Noise was drawn off the grid, and the audit was a share of the certified examples: none stays none."""
    evaluation = recipe.get("evaluation") or {}
    if evaluation.get("audit"):
        del evaluation["audit"]
    for certifier in evaluation.get("certifiers") or ():
        if certifier["name"] in ("smoothing", "plug-in"):
            certifier.setdefault("grid_bits", None)
    return recipe


def _from_3(recipe: dict[str, Any]) -> dict[str, Any]:
    """The attack that was run where none was named."""
    recipe["evaluation"] = {"attacks": [{"name": "pgd"}], **(recipe.get("evaluation") or {})}
    return recipe


def _from_4(recipe: dict[str, Any]) -> dict[str, Any]:
    """Square could start warm."""
    for attack in (recipe.get("evaluation") or {}).get("attacks") or ():
        attack.pop("warm", None)
    return recipe


UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1, 2: _from_2, 3: _from_3, 4: _from_4}
"""From each earlier form to the next."""


def upgrade(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored recipe in today's form, without its number.

    Raises:
        ValueError: it is of a later version.
    """
    recipe = deepcopy(dict(stored))
    number = recipe.pop("schema", 1)
    if not isinstance(number, int) or number > SCHEMA:
        raise ValueError(f"it is of schema {number!r}, this version of holdfast reads those up to {SCHEMA}")
    for earlier in range(number, SCHEMA):
        recipe = UPGRADES[earlier](recipe)
    return recipe


def schema_of(stored: Mapping[str, Any]) -> int:
    """The number of the form that a stored recipe has."""
    return int(stored.get("schema", 1))
