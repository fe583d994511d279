"""The sandwich as a curve: certified and attacked accuracy against eps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from holdfast.attacks import Attack
from holdfast.certify import SmoothedClassifier
from holdfast.component import distinct_labels
from holdfast.evaluation.evaluate import Evaluation, ring_if_unsound
from holdfast.evaluation.summary import names
from holdfast.inference import device_of
from holdfast.threat import Threat


def sandwich_curve(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    evaluation: Evaluation,
    attacks: Sequence[Attack],
    radii: Sequence[float],
    *,
    seed: int = 0,
    batch_size: int = 256,
) -> pd.DataFrame:
    """Certified and attacked accuracy at each radius: columns ``eps``, ``standard``, ``attacked``, ``certified``.

    The distances that the evaluation found count at every radius. At each, attacks that are neither dear nor
    minimum-norm run once more, only on examples that no smaller radius broke and whose deterministic
    certified radius does not reach it. ``attacked`` or ``certified`` is NaN where no attack or certifier ran.

    Args:
        images, labels: the first rows of what was evaluated; as many as the curve shall rest on.
        evaluation: their evaluation, for the predictions and the certified radii.
        radii: ascending, in the threat's norm.
    """
    if list(radii) != sorted(radii):
        raise ValueError("the radii must ascend: what a smaller one broke is not attacked again")
    table = evaluation.table.iloc[: len(images)]
    correct = table["correct"].to_numpy()
    guarantees = evaluation.summary["guarantees"]
    proofs = [name for name, guarantee in guarantees.items() if guarantee == "deterministic"]
    certified = np.full(len(table), -np.inf)
    for name in proofs:
        certified = np.maximum(certified, np.where(correct, table[f"{name}.radius"], -np.inf))
    # The smallest distance of an adversarial example so far; what the evaluation found counts at every radius.
    reached = np.where(correct, np.inf, 0.0)
    for name in names(table, "success"):
        reached = np.minimum(reached, table[f"{name}.distance"].to_numpy().astype(float))

    device = device_of(model)
    x, y = images.to(device), labels.to(device)

    def attacked(attack: Attack, standing: np.ndarray, eps: float) -> None:
        """Take over what an attack reaches on these examples, and ring where it should not."""
        rows = torch.from_numpy(standing)
        here = rows.to(device)
        beyond = threat.with_eps(eps)
        result = attack(model, x[here], y[here], beyond, seed=seed, indices=rows, batch_size=batch_size)
        if isinstance(model, SmoothedClassifier):
            result = model.confirmed(result, x[here], y[here], beyond)
        radius = torch.from_numpy(certified[standing]).to(device)
        ring_if_unsound(" or ".join(proofs), radius > eps, radius, attack.name, result, x[here], rows, threat)
        distance = result.adversarial_distance.double()
        # In float64 and at most eps: a float32 eps may round to more than eps itself.
        distance = torch.where(result.success, distance.clamp(max=eps), distance)
        reached[standing] = np.minimum(reached[standing], distance.cpu().numpy())

    for name, attack in zip(distinct_labels(attacks), attacks, strict=True):
        # What a certificate spared at the threat's own eps is not spared beyond.
        known = np.asarray(table.get(f"{name}.attacked", False), dtype=bool)  # it need not be of the evaluation
        spared = np.flatnonzero(correct & ~known & (certified < radii[-1]))
        if attack.minimum_norm and len(spared):
            attacked(attack, spared, radii[-1])
    points = []
    for eps in radii:
        for attack in attacks if eps > 0 else ():
            if attack.dear or attack.minimum_norm:
                continue
            standing = np.flatnonzero((certified < eps) & (reached > eps))
            if len(standing):
                attacked(attack, standing, eps)
        points.append(
            {
                "eps": eps,
                "standard": correct.mean(),
                "attacked": (reached > eps).mean() if attacks else np.nan,
                "certified": (certified >= eps).mean() if proofs else np.nan,
            }
        )
    return pd.DataFrame(points)
