"""One table per evaluation: certify first, attack what is not certified, and ring if the two disagree."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from holdfast.analysis.local_lipschitz import local_lipschitz
from holdfast.attacks import Attack, AttackResult
from holdfast.certify import Certificate, Certifier, SmoothedClassifier, SmoothingCertifier, SoundnessError
from holdfast.certify.smoothed import sure
from holdfast.component import distinct_labels
from holdfast.evaluation.sanity import (
    batch_dependence,
    blind_successes,
    misplaced_labels,
    suspicions,
    unpredicted_classes,
)
from holdfast.evaluation.summary import summarise
from holdfast.inference import check_inputs, check_logits, device_of, fingerprint, frozen_eval, mix_seed, predict
from holdfast.threat import Threat


@dataclass(frozen=True)
class Evaluation:
    """What is known of each example, and the accuracies that follow."""

    table: pd.DataFrame
    """One row per example: ``index``, ``label``, ``prediction``, ``correct`` (of a smoothed classifier: not surely
    wrong after 1,000 votes, as its attacks count only where as many are sure); for each certifier
    ``NAME.verified``, ``NAME.radius``, ``NAME.status``, and ``NAME.margin``, ``NAME.method``,
    ``NAME.samples``, ``NAME.abstained`` where it has them; for each attack ``NAME.attacked`` (false where the
    clean prediction is wrong or a certificate made it needless), ``NAME.success`` (wrong inside the threat set),
    ``NAME.distance`` (of the adversarial example, inf without one; a minimum-norm attack's may exceed eps),
    ``NAME.origin`` (restart and step that found it), ``NAME.forwards``, ``NAME.backwards``; and, where asked for,
    ``local_lipschitz``, the largest quotient found around the example, NaN where none was sought."""
    summary: dict[str, Any]
    """``examples``, ``threat``, ``standard``; ``attacked`` and ``certified`` per name; ``bracket``, the
    accuracy under all attacks and under any certificate; ``counts``, ``intervals`` (95 %), ``passes``,
    ``guarantees``, ``warnings`` (reasons to doubt the numbers), ``seconds`` and their ``timings`` per stage; where
    asked for ``local_lipschitz``: mean and largest quotient, and of how many examples."""
    subject: nn.Module = field(repr=False)
    """The classifier that all of it is about: the model, or what the certifiers make of it (its smoothed one)."""
    seconds: pd.DataFrame
    """What each example cost each certifier that knows it; beside the table, which is the same every time."""
    adversarial: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """For each attack the numbers (M,) of the right examples it found an adversarial for, and those, (M, ...)."""


class Store(Protocol):
    """Keeps finished pieces of an evaluation, so that one that was cut off need not make them again."""

    def get(self, key: str) -> AttackResult | None:
        """The result of a piece, if it is kept; the key tells attack, examples, model, threat and seed."""

    def put(self, key: str, result: AttackResult) -> None:
        """Keep it."""


PIECE = 256
"""Examples attacked in one piece: between two pieces an evaluation can be cut off without loss."""


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: Threat | str,
    attacks: Sequence[Attack | str | Mapping[str, Any]] = (),
    certifiers: Sequence[Certifier | str | Mapping[str, Any]] = (),
    *,
    audit: float = 0.1,
    lipschitz_examples: int = 0,
    seed: int = 0,
    batch_size: int = 256,
    on_progress: Callable[[str, int, int], None] | None = None,
    store: Store | None = None,
) -> Evaluation:
    """Squeeze the robust accuracy of a model between its certificates and the attacks on it.

    Every attack runs on the examples that are right and not deterministically certified; a share ``audit``
    of the certified ones is attacked all the same, to test the certificates.

    Args:
        model: any module from images to logits; evaluated in eval mode and left as it was.
        images: (N, ...) floating, in the threat's box.
        labels: (N,) integers in 0..K−1.
        threat: the threat model, or text such as ``"linf:8/255"``.
        attacks: attacks, their names, or mappings with a name and settings; each run on its own.
        certifiers: certifiers, likewise.
        audit: share of the certified examples that are attacked too, 0 to 1.
        lipschitz_examples: measure ``analysis.local_lipschitz`` of the logits, in the 1-norm, around the first so
            many examples. Left out where it means nothing: for a smoothed classifier, in l_0, and at eps = 0.
        seed: with the example's number it determines everything drawn for an example.
        on_progress: told of each finished piece: its stage, how many examples stand (−1 where that is not known
            yet), how many are left to do.
        store: keeps finished pieces and gives them back.

    Raises:
        ValueError: inputs, labels or names that make no sense, or a model a certifier cannot handle.
        FloatingPointError: the model answers with NaN or inf.
        SoundnessError: an attack broke a deterministically certified example.
    """
    threat = Threat.parse(threat)
    attackers = [Attack.parse(attack) for attack in attacks]
    provers = [Certifier.parse(certifier) for certifier in certifiers]
    if not 0 <= audit <= 1:
        raise ValueError(f"audit is a share in 0..1, given {audit}")
    if not len(images):
        raise ValueError("there are no examples to evaluate")
    labels = check_inputs(images, labels, threat)
    device = device_of(model)
    x, y = images.to(device), labels.to(device)
    report = on_progress or (lambda stage, standing, left: None)
    seconds: dict[str, float] = {}

    subject = _subject(model, provers)
    with _timed(seconds, "standard"), frozen_eval(model):
        logits = predict(model, x, batch_size)
        check_logits(logits, y)
        if isinstance(subject, SmoothedClassifier):
            votes = subject.votes(x, seed=seed)
            prediction, known = votes.argmax(1), sure(votes)
            correct = (known == y) | (known < 0)
        else:
            prediction = logits.argmax(1)
            correct = prediction == y
    report("standard", int(correct.sum()), 0)
    columns: dict[str, Any] = {
        "index": np.arange(len(y)),
        "label": _numpy(y),
        "prediction": _numpy(prediction),
        "correct": _numpy(correct),
    }

    guarantees: dict[str, str] = {}
    proofs: dict[str, Certificate] = {}
    each: dict[str, Any] = {}
    for name, certifier in zip(distinct_labels(provers), provers, strict=True):
        with _timed(seconds, name):
            prove: Callable[..., Certificate] = certifier
            if isinstance(certifier, SmoothingCertifier):
                prove = partial(certifier, on_progress=_sometimes(partial(_tell_samples, report, name), len(x)))
            certificate = prove(model, x, y, threat, seed=seed, batch_size=batch_size)
        guarantees[name] = certificate.guarantee
        columns[f"{name}.verified"] = _numpy(certificate.verified)
        columns[f"{name}.radius"] = _numpy(certificate.radius)
        columns[f"{name}.status"] = certificate.status
        if certificate.margin is not None:
            columns[f"{name}.margin"] = _numpy(certificate.margin)
        if certificate.method is not None:
            columns[f"{name}.method"] = certificate.method
        if certificate.seconds is not None:
            each[name] = _numpy(certificate.seconds)
        if certificate.samples is not None and certificate.abstained is not None:
            columns[f"{name}.samples"] = _numpy(certificate.samples)
            columns[f"{name}.abstained"] = _numpy(certificate.abstained)
        if certificate.guarantee == "deterministic":
            proofs[name] = certificate
            _ring_if_wrong(name, certificate, correct, x, threat)
        report(name, int(certificate.verified.sum()), 0)

    proven = torch.stack([torch.zeros_like(correct), *(proof.verified for proof in proofs.values())]).any(0)
    rows = (correct & (~proven | _share(len(y), audit, seed).to(device))).nonzero().squeeze(1)
    adversarial: dict[str, tuple[Tensor, Tensor]] = {}
    for name, attack in zip(distinct_labels(attackers), attackers, strict=True):
        pieces = []
        standing = int(correct.sum())
        with _timed(seconds, name):
            for piece in rows.split(PIECE) if len(rows) else ():
                noise = getattr(subject, "noise", None)
                key = f"{attack.name}-{fingerprint(model, x[piece], y[piece], piece, threat, seed, attack, noise)}"
                result = None if store is None else store.get(key)
                if result is None:
                    result = attack(
                        subject, x[piece], y[piece], threat, seed=seed, indices=piece.cpu(), batch_size=batch_size
                    )
                    if isinstance(subject, SmoothedClassifier):
                        result = subject.confirmed(result, x[piece], y[piece], threat)
                    if store is not None:
                        store.put(key, result)
                for proved_by, proof in proofs.items():
                    claims = proof.verified[piece], proof.radius[piece]
                    ring_if_unsound(proved_by, *claims, name, result, x[piece], piece, threat)
                pieces.append(result)
                standing -= int(result.success.sum())
                report(name, standing, len(rows) - sum(len(part.success) for part in pieces))
        result = _joined(pieces, x, device)
        columns[f"{name}.attacked"] = _scatter(rows, torch.ones_like(rows).bool(), torch.zeros_like(correct))
        columns[f"{name}.success"] = _scatter(rows, result.success, ~correct)
        away = torch.where(correct, torch.inf, 0.0).to(result.distance)
        columns[f"{name}.distance"] = _scatter(rows, result.adversarial_distance, away)
        columns[f"{name}.forwards"] = _scatter(rows, result.forwards, torch.zeros_like(y))
        columns[f"{name}.backwards"] = _scatter(rows, result.backwards, torch.zeros_like(y))
        origin = np.full(len(y), "", dtype=object)
        origin[_numpy(rows)] = result.origin
        columns[f"{name}.origin"] = origin
        hits = torch.isfinite(result.adversarial_distance)
        adversarial[name] = rows[hits].cpu(), result.x_adv[hits].cpu()

    steep: dict[str, Any] = {}
    count = min(lipschitz_examples, len(y))
    if count and subject is model and threat.eps > 0 and not threat.discrete:
        with _timed(seconds, "local_lipschitz"):
            value = local_lipschitz(model, x[:count], threat, seed=seed, upper=False, batch_size=batch_size).value
        columns["local_lipschitz"] = np.full(len(y), np.nan)
        columns["local_lipschitz"][:count] = _numpy(value)
        steep = {"mean": value.mean().item(), "max": value.max().item(), "examples": count}
        report(f"local Lipschitz constant: mean {steep['mean']:.4g} of {count} examples", -1, 0)

    table = pd.DataFrame(columns)
    summary = summarise(table, threat, guarantees, seconds)
    for name, certifier in zip(distinct_labels(provers), provers, strict=True):
        if name in summary.get("sampling", {}):
            summary["sampling"][name] |= certifier.model_dump(exclude={"name"})
    if steep:
        summary["local_lipschitz"] = steep
    doubts = [*batch_dependence(model, x), *misplaced_labels(table), *unpredicted_classes(table)]
    if attackers:
        doubts += [*suspicions(subject, x, y, threat), *blind_successes(table)]
    return Evaluation(table, summary | {"warnings": doubts}, subject, pd.DataFrame(each), adversarial)


def _subject(model: nn.Module, certifiers: Sequence[Certifier]) -> nn.Module:
    """The one classifier that all certificates are about."""
    subjects = [certifier.subject(model) for certifier in certifiers] or [model]
    smoothed = [one for one in subjects if isinstance(one, SmoothedClassifier)]
    if smoothed and (len(smoothed) < len(subjects) or len({one.noise for one in smoothed}) > 1):
        raise ValueError(
            "certifiers of a network, or of its vote under one noise or another, speak of different classifiers: "
            "evaluate them one by one"
        )
    return subjects[0]


def _sometimes(tell: Callable[[int, int], None], count: int) -> Callable[[int, int], None]:
    """Passes on what is told of each further tenth of the examples."""
    told = count

    def perhaps(left: int, spent: int) -> None:
        nonlocal told
        if left and told - left >= count / 10:
            told = left
            tell(left, spent)

    return perhaps


def _tell_samples(report: Callable[[str, int, int], None], name: str, left: int, spent: int) -> None:
    report(f"{name} ({spent} samples)", -1, left)


def _joined(pieces: list[AttackResult], x: Tensor, device: torch.device) -> AttackResult:
    """One result of several, in order."""
    if not pieces:
        none = torch.zeros(0, dtype=torch.int64, device=device)
        return AttackResult(x[:0], none.bool(), x.new_zeros(0), none, none, np.empty(0, dtype=object))

    def join(name: str) -> Tensor:
        return torch.cat([getattr(piece, name).to(device) for piece in pieces])

    return AttackResult(
        join("x_adv"),
        join("success"),
        join("distance"),
        join("forwards"),
        join("backwards"),
        np.concatenate([piece.origin for piece in pieces]),
    )


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started


def _numpy(tensor: Tensor) -> Any:
    return tensor.cpu().numpy().copy()


def _share(count: int, share: float, seed: int) -> Tensor:
    """A random subset of 0..count−1 of about the given share, (count,) bool."""
    generator = torch.Generator().manual_seed(mix_seed(seed, count))
    return torch.rand(count, generator=generator) < share


def _scatter(rows: Tensor, values: Tensor, default: Tensor) -> Any:
    """The values in their rows, the default elsewhere."""
    return _numpy(default.index_put((rows,), values))


def _ring_if_wrong(name: str, certificate: Certificate, correct: Tensor, x: Tensor, threat: Threat) -> None:
    """The alarm: a certificate for an example that the model gets wrong without any attack."""
    wrong = (certificate.verified & ~correct).nonzero().squeeze(1)
    if len(wrong):
        example = int(wrong[0])
        raise SoundnessError(
            f"example {example} is certified by {name} in {threat}, but the model gets it wrong as it is "
            f"({len(wrong)} such examples)",
            example,
            x[example].cpu(),
            x[example].cpu(),
        )


def ring_if_unsound(
    certifier: str,
    verified: Tensor,
    radius: Tensor,
    attack: str,
    result: AttackResult,
    x: Tensor,
    numbers: Tensor,
    threat: Threat,
) -> None:
    """The alarm: an attack succeeded on a verified example, or nearer to an example than its certified radius.

    Args:
        verified, radius, result, x, numbers: of the attacked examples, (M, ...); their numbers in the table.

    Raises:
        SoundnessError: naming the first such example.
    """
    nearer = result.adversarial_distance.double() < radius * (1 - 1e-5)  # the distance is rounded, too
    hits = ((result.success & verified) | nearer).nonzero().squeeze(1)
    if len(hits):
        hit, example = int(hits[0]), int(numbers[hits[0]])
        claimed, found = f"{radius[hit].item():.6g}", f"{result.distance[hit].item():.6g}"
        raise SoundnessError(
            f"example {example} is certified by {certifier} up to {claimed} in {threat}, but {attack} breaks it "
            f"at distance {found} ({len(hits)} such examples): the certificate, or what it assumes of the model, "
            "is wrong",
            example,
            x[hit].cpu(),
            result.x_adv[hit].cpu(),
        )
