"""The sandwich as a curve: certified and attacked accuracy against eps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from holdfast.attacks import Attack, AttackResult
from holdfast.certify import Certificate
from holdfast.component import distinct_labels
from holdfast.evaluation.accuracy import broken_from, names, radius_known
from holdfast.evaluation.alarm import Claim, Points, Watch, claims_of, disagreement, exact_distance
from holdfast.evaluation.columns import refutations
from holdfast.evaluation.radii import ask_at, in_vain
from holdfast.evaluation.sandwich import Evaluation
from holdfast.evaluation.subject import subject_of
from holdfast.inference import device_of, door
from holdfast.threat import Threat


@door
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

    At the evaluation's own eps it shows the evaluation's own numbers of these images, at 0 the standard accuracy.
    At other radii certifiers are asked again about what their radii leave open, and attacks that are not
    minimum-norm run once more: below eps on what they broke at eps, beyond it on what stands; never on what is
    deterministically certified there. Those that take their time are asked in a cheaper form (``brief``). Without
    attacks ``attacked`` is known at 0 and eps only, if there; with others than the evaluation's it may lie lower at
    eps. ``certified`` is NaN where nothing but estimates were made, or sequential smoothing leaves a radius open.

    Args:
        model: the classifier that the evaluation is about, ``evaluation.subject``.
        images, labels: the first rows of what was evaluated; as many as the curve shall rest on.
        evaluation: their evaluation; adversarial images that it lacks are found again where the alarm needs one.
        attacks: those of the evaluation, or others.
        radii: ascending, in the threat's norm.

    Raises:
        SoundnessError: an attack broke an example within its certified radius.
    """
    if list(radii) != sorted(radii):
        raise ValueError("the radii must ascend: what a smaller one broke is not attacked again")
    if not len(radii):
        raise ValueError("a curve needs radii")
    device, subject = device_of(model, images.device), subject_of(model)
    x, y = images.to(device), labels.to(device)
    table = evaluation.table.iloc[: len(images)]
    guarantees = evaluation.summary["guarantees"]
    provers = [name for name, guarantee in guarantees.items() if guarantee != "estimate"]
    proofs = [name for name in provers if guarantees[name] == "deterministic"]
    refuted: list[tuple[str, float, Tensor, AttackResult]] = []

    def note(name: str, here: Tensor, certificate: Certificate, eps: float) -> None:
        """Keep the counterexamples that a certifier finds at further radii."""
        if certificate.counterexample is not None:
            how = model, x[here], y[here], threat.with_eps(eps), batch_size
            rows, result = refutations(name, certificate, *how)
            refuted.append((name, eps, here[rows], result))

    for name in proofs:
        if (vain := in_vain(table, name)) and name in evaluation.certifiers:
            radius, unproven = (table[column].to_numpy().copy() for column in (f"{name}.radius", vain))
            ask = partial(ask_at, evaluation.certifiers[name].brief, model, x, y, threat, radii, radius, unproven)
            broken = np.asarray(table.get(f"{name}.distance", np.inf))  # no attack's, which may find it wrong
            ask(broken=broken, told=partial(note, name), seed=seed, batch_size=batch_size)
            table = table.assign(**{f"{name}.radius": radius, vain: unproven})
    correct = table["correct"].to_numpy()
    proven = np.full(len(table), -np.inf)
    for name in proofs:
        proven = np.maximum(proven, np.where(correct, table[f"{name}.radius"], -np.inf))

    def found(name: str, row: int) -> Tensor | None:
        """The adversarial image that an attack of the evaluation found for an example; None of a certifier that did
        not keep it."""
        rows, x_adv = evaluation.adversarial.get(name, (torch.zeros(0), x[:0]))
        if len(kept := x_adv[rows == row]):
            return kept[0]
        if name in evaluation.certifiers:
            return None
        attack, numbers = dict(zip(distinct_labels(attacks), attacks, strict=True))[name], torch.tensor([row])
        return attack(model, x[[row]], y[[row]], threat, seed=seed, indices=numbers).x_adv[0]

    claims = claims_of(table, proofs, evaluation.certifiers)
    watch = Watch(model, x, threat)
    _check_again(watch, claims, found, table, x, y)
    reached = broken_from(table, threat.eps)

    def attacked(attack: Attack, rows: np.ndarray, eps: float) -> None:
        """Take over what an attack reaches on these examples, and ring where it should not."""
        if not len(rows):
            return
        numbers = torch.from_numpy(rows)
        here, beyond = numbers.to(device), threat.with_eps(eps)
        result = attack(model, x[here], y[here], beyond, seed=seed, indices=numbers, batch_size=batch_size)
        taken(attack.name, subject.confirmed(result, x[here], y[here], beyond), here, eps)

    def taken(name: str, result: AttackResult, here: Tensor, eps: float) -> None:
        hits = torch.isfinite(result.adversarial_distance).to(device)
        points = Points(x[here][hits], y[here][hits], result.x_adv[hits], here[hits])
        watch.check(name, [claim.take(points.numbers) for claim in claims], points, wrong=True)
        distance = exact_distance(threat, points.x, points.x_adv)
        distance = torch.where(result.success[hits].cpu(), distance.clamp(max=eps), distance)
        broken = here[hits].cpu().numpy()
        reached[broken] = np.minimum(reached[broken], distance.numpy())

    for name, eps, here, result in refuted:
        taken(name, result, here, eps)

    for name, attack in zip(distinct_labels(attacks), attacks, strict=True):
        spared = ~np.asarray(table.get(f"{name}.attacked", False), dtype=bool)
        if attack.minimum_norm:  # what a certificate spared at the threat's own eps is not spared beyond
            attacked(attack, np.flatnonzero(correct & spared & (proven < radii[-1])), radii[-1])
        elif f"{name}.success" not in table:
            attacked(attack, np.flatnonzero((reached > threat.eps) & (proven < threat.eps)), threat.eps)
    refutes = any(f"{name}.success" in table for name in evaluation.certifiers)
    at_eps = reached <= threat.eps
    points = []
    for eps in radii:
        for attack in attacks if eps not in (0, threat.eps) else ():
            if not attack.minimum_norm:
                asked = at_eps if eps < threat.eps else ~at_eps
                attacked(attack.brief, np.flatnonzero(asked & (reached > eps) & (proven < eps)), eps)
        tried = bool(attacks) or refutes or (eps in (0, threat.eps) and bool(names(table, "success")))
        # What one certifier leaves open, another may know.
        known = any(radius_known(table, name, eps) for name in provers)
        reaches = [(table[f"{name}.radius"] >= eps) | (eps == 0) for name in provers]
        points.append(
            {
                "eps": eps,
                "standard": correct.mean(),
                "attacked": (correct & ((reached > eps) | (eps == 0))).mean() if tried else np.nan,
                "certified": (correct & np.any(reaches, axis=0)).mean() if known else np.nan,
            }
        )
    for doubt in disagreement(watch.disagreements):
        warnings.warn(f"the sandwich curve: {doubt}", stacklevel=2)
    return pd.DataFrame(points, columns=["eps", "standard", "attacked", "certified"])


def _check_again(
    watch: Watch,
    claims: Sequence[Claim],
    found: Callable[[str, int], Tensor | None],
    table: pd.DataFrame,
    x: Tensor,
    y: Tensor,
) -> None:
    """The alarm: what the evaluation's attacks found contradicts what is certified by now."""
    if not claims:
        return
    most = torch.stack([claim.radius for claim in claims]).amax(0).numpy()
    for attack in names(table, "success"):
        distance = table[f"{attack}.distance"].to_numpy().astype(float)
        near = np.flatnonzero(np.isfinite(distance) & (distance <= most))
        again = {int(row): x_adv for row in near if (x_adv := found(attack, int(row))) is not None}
        if again:
            here, x_adv = torch.tensor(list(again), device=x.device), torch.stack(list(again.values())).to(x.device)
            points = Points(x[here], y[here], x_adv, here)
            watch.check(attack, [claim.take(here) for claim in claims], points, wrong=True)
