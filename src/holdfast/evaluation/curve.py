"""The sandwich as a curve: certified and attacked accuracy against eps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from holdfast.attacks import Attack
from holdfast.component import distinct_labels
from holdfast.evaluation.accuracy import broken_from, certified, names, radius_known
from holdfast.evaluation.sandwich import Evaluation, ask_at, ring_if_unsound
from holdfast.evaluation.subject import subject_of
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

    At the evaluation's own eps it shows the evaluation's own numbers, at 0 the standard accuracy. At other radii a
    certifier whose radius was too expensive to search is asked again, and attacks that are not minimum-norm run
    once more, those of thousands of passes in a cheaper form (``Attack.brief``): below eps on what they broke at
    eps, beyond it on what stands; never on what is deterministically certified there. ``attacked`` is NaN where no
    attack ran, ``certified`` where nothing but estimates were made, or sequential smoothing leaves a radius open.

    Args:
        model: the classifier that the evaluation is about, ``evaluation.subject``.
        images, labels: the first rows of what was evaluated; as many as the curve shall rest on.
        evaluation: their evaluation.
        attacks: those of the evaluation, or others.
        radii: ascending, in the threat's norm.

    Raises:
        SoundnessError: an attack broke an example within its certified radius.
    """
    if list(radii) != sorted(radii):
        raise ValueError("the radii must ascend: what a smaller one broke is not attacked again")
    device, subject = device_of(model), subject_of(model)
    x, y = images.to(device), labels.to(device)
    table = evaluation.table.iloc[: len(images)]
    guarantees = evaluation.summary["guarantees"]
    provers = [name for name, guarantee in guarantees.items() if guarantee != "estimate"]
    proofs = [name for name in provers if guarantees[name] == "deterministic"]
    for name in proofs:
        if f"{name}.unproven" in table and name in evaluation.certifiers:
            certifier, further = evaluation.certifiers[name], [eps for eps in radii if eps > 0]
            radius, unproven = (table[f"{name}.{what}"].to_numpy().copy() for what in ("radius", "unproven"))
            ask_at(certifier, model, x, y, threat, further, radius, unproven, seed=seed, batch_size=batch_size)
            table = table.assign(**{f"{name}.radius": radius, f"{name}.unproven": unproven})
    correct = table["correct"].to_numpy()
    proven = np.full(len(table), -np.inf)
    for name in proofs:
        proven = np.maximum(proven, np.where(correct, table[f"{name}.radius"], -np.inf))
    reached = broken_from(table, threat.eps)

    def attacked(attack: Attack, rows: np.ndarray, eps: float) -> None:
        """Take over what an attack reaches on these examples, and ring where it should not."""
        if not len(rows):
            return
        numbers = torch.from_numpy(rows)
        here, beyond = numbers.to(device), threat.with_eps(eps)
        result = attack(model, x[here], y[here], beyond, seed=seed, indices=numbers, batch_size=batch_size)
        result = subject.confirmed(result, x[here], y[here], beyond)
        radius = torch.from_numpy(proven[rows]).to(device)
        ring_if_unsound(" or ".join(proofs), radius >= eps, radius, attack.name, result, x[here], numbers, threat)
        distance = result.adversarial_distance.double()
        distance = torch.where(result.success, distance.clamp(max=eps), distance)
        reached[rows] = np.minimum(reached[rows], distance.cpu().numpy())

    for name, attack in zip(distinct_labels(attacks), attacks, strict=True):
        spared = ~np.asarray(table.get(f"{name}.attacked", False), dtype=bool)
        if attack.minimum_norm:  # what a certificate spared at the threat's own eps is not spared beyond
            attacked(attack, np.flatnonzero(correct & spared & (proven < radii[-1])), radii[-1])
        elif f"{name}.success" not in table:
            attacked(attack, np.flatnonzero((reached > threat.eps) & (proven < threat.eps)), threat.eps)
    at_eps = reached <= threat.eps
    tried, points = bool(attacks or names(table, "success")), []
    for eps in radii:
        for attack in attacks if eps not in (0, threat.eps) else ():
            if not attack.minimum_norm:
                asked = at_eps if eps < threat.eps else ~at_eps
                attacked(attack.brief, np.flatnonzero(asked & (reached > eps) & (proven < eps)), eps)
        known_here = all(radius_known(table, name, eps) for name in provers)
        shares = [certified(table, name, eps) for name in provers] if known_here else []
        points.append(
            {
                "eps": eps,
                "standard": correct.mean(),
                "attacked": (correct & ((reached > eps) | (eps == 0))).mean() if tried else np.nan,
                "certified": np.any(shares, axis=0).mean() if shares else np.nan,
            }
        )
    return pd.DataFrame(points)
