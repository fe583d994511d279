"""One table per evaluation: certify first, attack what is not certified, and ring if the two disagree."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from holdfast.analysis.local_lipschitz import local_lipschitz
from holdfast.attacks import Attack, AttackResult
from holdfast.certify import Certificate, Certifier
from holdfast.component import distinct_labels
from holdfast.evaluation.alarm import Claim, Points, Watch, disagreement, exact_distance
from holdfast.evaluation.audit import CHEAP, FEWEST, Audit, affordable, audit, closest_first, radii_of
from holdfast.evaluation.sanity import (
    batch_dependence,
    blind_successes,
    excessive_radius,
    hidden_gradients,
    misplaced_labels,
    randomness,
    suspicions,
    unpredicted_classes,
)
from holdfast.evaluation.subject import common_subject
from holdfast.evaluation.summary import summarise
from holdfast.inference import (
    check_inputs,
    check_logits,
    device_of,
    fingerprint,
    frozen_eval,
    plain_arithmetic,
    predict,
)
from holdfast.threat import Threat


@dataclass(frozen=True)
class Evaluation:
    """What is known of each example, and the accuracies that follow."""

    table: pd.DataFrame
    """One row per example: ``index``, ``label``, ``prediction`` (−1 where a smoothed classifier abstains),
    ``correct`` (an abstention is not), of a smoothed classifier ``not_surely_wrong`` (1,000 votes leave the label
    possible); for each certifier ``NAME.verified``, ``NAME.radius``, ``NAME.status``, and ``NAME.unproven`` (the
    smallest radius asked in vain, where it was asked at some radii only), ``NAME.above`` (the smallest tried in
    vain, where it was searched), ``NAME.margin``, ``NAME.method``,
    ``NAME.samples``, ``NAME.abstained`` where it has them; for each attack ``NAME.attacked`` (false where the
    clean prediction is wrong or a certificate made it needless), ``NAME.success`` (wrong inside the threat set),
    ``NAME.distance`` (of the adversarial example, in float64, inf without one; a minimum-norm attack's may exceed
    eps),
    ``NAME.origin`` (restart and step that found it), ``NAME.forwards``, ``NAME.backwards``; and, where asked for,
    ``local_lipschitz``, the largest quotient found around the example, NaN where none was sought."""
    summary: dict[str, Any]
    """``examples``, ``threat``, ``standard``; ``attacked`` and ``certified`` per name; ``bracket``, the
    accuracy under all attacks and under any certificate, whose ``bracket_guarantee`` is that of all together;
    ``not_surely_wrong`` of a smoothed classifier; ``counts``, ``intervals`` (95 %), ``passes``,
    ``guarantees``, ``arithmetic`` (of what network the deterministic ones are true), ``warnings`` (reasons to doubt
    the numbers), ``seconds`` and their ``timings`` per stage; where asked for ``local_lipschitz``: mean and largest
    quotient, and of how many examples; beside deterministic certificates ``float32_disagrees``: around how many
    examples float32 errs within a certified radius, where the network as a function of real numbers is right, as
    the certificate says, and ``audit``: examples, passes, the smallest margin seen, and where."""
    subject: nn.Module = field(repr=False)
    """The classifier that all of it is about: the model, or what the certifiers make of it (its smoothed one)."""
    seconds: pd.DataFrame
    """What each example cost each certifier that knows it; beside the table, which is the same every time."""
    adversarial: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """For each attack the numbers (M,) of the right examples it found an adversarial for, and those, (M, ...)."""
    certifiers: dict[str, Certifier] = field(default_factory=dict)
    """By the names that they have in the table."""


class Store(Protocol):
    """Keeps finished pieces of an evaluation, so that one that was cut off need not make them again."""

    def get(self, key: str) -> AttackResult | None:
        """The result of a piece, if it is kept; the key tells attack, examples, model, threat and seed."""

    def put(self, key: str, result: AttackResult) -> None:
        """Keep it."""


RADII_OF_SAMPLES = "its radii are known with a tolerance, or mode=fixed"
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
    radii: Sequence[float] = (),
    audit: float = 0.02,
    attack_certified: bool = False,
    lipschitz_examples: int = 0,
    seed: int = 0,
    batch_size: int = 256,
    on_progress: Callable[[str, int, int], None] | None = None,
    store: Store | None = None,
) -> Evaluation:
    """Squeeze the robust accuracy of a model between its certificates and the attacks on it.

    Every attack runs on the examples that are right and not deterministically certified; the certificates are
    tested by an audit of those that are nearest to failing.

    Args:
        model: any module from images to logits; evaluated in eval mode and left as it was.
        images: (N, ...) floating, in the threat's box.
        labels: (N,) integers in 0..K−1.
        threat: the threat model, or text such as ``"linf:8/255"``.
        attacks: attacks, their names, or mappings with a name and settings; each run on its own.
        certifiers: certifiers, likewise.
        radii: further radii at which certified accuracy shall be known (``certified_at``): certifiers whose radius
            is too expensive to search are asked at each of them.
        audit: share, 0 to 1, of the passes so far that are spent on attacking certified examples where a false
            certificate would show (see ``evaluation.audit``); 0 for none, otherwise at least 8 examples of each
            certifier. Passes are those of the attacks, forward and backward, and one of each example for the answer
            and for each certifier.
        attack_certified: run the attacks on the certified examples, too, for what they themselves come to.
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
    named_attacks = dict(zip(distinct_labels(attackers), attackers, strict=True))
    named_certifiers = dict(zip(distinct_labels(provers), provers, strict=True))
    if not 0 <= audit <= 1:
        raise ValueError(f"audit is a share in 0..1, given {audit}")
    if not len(images):
        raise ValueError("there are no examples to evaluate")
    open_radii = [radius for radius in radii if radius not in (0, threat.eps)]
    for name, certifier in named_certifiers.items() if open_radii else ():
        if not certifier.knows_radii:
            raise ValueError(f"radii={list(radii)}: {name} stops as soon as eps is decided; {RADII_OF_SAMPLES}")
    labels = check_inputs(images, labels, threat)
    device = device_of(model)
    making = _Making(model, images.to(device), labels.to(device), threat, seed, batch_size, on_progress)
    making.certify(named_certifiers, radii)
    making.attack(named_attacks, attack_certified, store)
    making.audit(audit)
    making.measure_steepness(lipschitz_examples)
    return making.evaluation(named_certifiers, named_attacks)


class _Making:
    """One call of ``evaluate``: the columns of its table as they come."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        seed: int,
        batch_size: int,
        report: Callable[[str, int, int], None] | None,
    ) -> None:
        self.model, self.x, self.y, self.threat = model, x, y, threat
        self.seed, self.batch_size = seed, batch_size
        self.report = report or (lambda stage, standing, left: None)
        self.columns: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.guarantees: dict[str, str] = {}
        self.arithmetic: dict[str, str] = {}
        """Of the deterministic certifiers."""
        self.proofs: dict[str, Certificate] = {}
        """The deterministic certificates."""
        self.each: dict[str, Any] = {}
        """Seconds of each example, by certifier."""
        self.adversarial: dict[str, tuple[Tensor, Tensor]] = {}
        self.steep: dict[str, Any] = {}
        self.doubts: list[str] = []
        self.audited: Audit | None = None

    def certify(self, certifiers: dict[str, Certifier], radii: Sequence[float]) -> None:
        """What the classifier answers, and what is certified of it."""
        self.subject = common_subject(self.model, list(certifiers.values()))
        with self._timed("standard"), frozen_eval(self.model), plain_arithmetic(self.x.device):
            logits = predict(self.model, self.x, self.batch_size)
            check_logits(logits, self.y)
            self.classes = logits.shape[1]
        certificates = {name: self._certificate(name, one) for name, one in certifiers.items()}
        with self._timed("standard"):
            answers = self.subject.answers(logits, self.x, self.y, list(certificates.values()), self.seed)
        self.correct = answers.correct
        self.watch = Watch(self.subject.classifier, self.x, self.threat)
        self.report("standard", int(self.correct.sum()), 0)
        numbers = np.arange(len(self.y))
        self.columns |= {"index": numbers, "label": _numpy(self.y), "prediction": _numpy(answers.prediction)}
        self.columns |= {"correct": _numpy(self.correct)} | {k: _numpy(v) for k, v in answers.further.items()}
        for name, certificate in certificates.items():
            self._enter(name, certificate)
            if certificate.guarantee == "deterministic":
                self.proofs[name] = certificate
                with self._timed(name):
                    self._ask(name, certifiers[name], radii)
            self.report(name, int(certificate.verified.sum()), 0)
        wrong = (~self.correct).nonzero().squeeze(1)
        self._check("the model itself", Points(self.x[wrong], self.y[wrong], self.x[wrong], wrong), wrong=True)

    def _certificate(self, name: str, certifier: Certifier) -> Certificate:
        how: dict[str, Any] = {"seed": self.seed, "batch_size": self.batch_size}
        if "on_progress" in inspect.signature(certifier).parameters:  # a stranger's call may know nothing of it
            how["on_progress"] = _sometimes(partial(_tell_samples, self.report, name), len(self.x))
        with self._timed(name):
            return certifier(self.model, self.x, self.y, self.threat, **how)

    def _enter(self, name: str, certificate: Certificate) -> None:
        """The columns of a certificate. Verified and a radius of at least eps are one and the same."""
        eps, radius = self.threat.eps, _numpy(certificate.radius).astype(float)
        # At eps = 0 there is nothing to prove.
        verified = _numpy(certificate.verified) if eps > 0 else _numpy(self.correct)
        if certificate.guarantee != "deterministic":  # those ring instead
            verified = verified & _numpy(self.correct)
        radius = np.where(verified, np.maximum(radius, eps), np.minimum(radius, np.nextafter(eps, -1)))
        self.guarantees[name] = certificate.guarantee
        if certificate.arithmetic is not None:
            self.arithmetic[name] = certificate.arithmetic
        self.columns |= {f"{name}.verified": verified, f"{name}.radius": np.maximum(radius, 0)}
        self.columns[f"{name}.status"] = certificate.status
        if certificate.seconds is not None:
            self.each[name] = _numpy(certificate.seconds)
        for what in ("unproven", "above", "margin", "samples", "abstained"):
            if (value := getattr(certificate, what)) is not None:
                self.columns[f"{name}.{what}"] = _numpy(value)
        if certificate.method is not None:
            self.columns[f"{name}.method"] = certificate.method

    def _ask(self, name: str, certifier: Certifier, radii: Sequence[float]) -> None:
        if (vain := in_vain(self.columns, name)) and len(radii):
            known = self.columns[f"{name}.radius"], self.columns[vain]
            ask = partial(ask_at, certifier, self.model, self.x, self.y, self.threat, radii, *known)
            ask(seed=self.seed, batch_size=self.batch_size)

    def attack(self, attacks: dict[str, Attack], certified: bool, store: Store | None) -> None:
        """Attack what is right and not proven, or all of what is right; ring where it should not fall."""
        x, y, correct = self.x, self.y, self.correct
        proven = torch.stack([torch.zeros_like(correct), *(proof.verified for proof in self.proofs.values())]).any(
            0
        )
        rows = (correct & (~proven | certified)).nonzero().squeeze(1)
        for name, attack in attacks.items():
            pieces: list[AttackResult] = []
            standing = int(correct.sum())
            with self._timed(name):
                for piece in rows.split(PIECE) if len(rows) else ():
                    pieces.append(self._piece(name, attack, piece, store))
                    standing -= int(pieces[-1].success.sum())
                    self.report(name, standing, len(rows) - sum(len(part.success) for part in pieces))
            result = _joined(pieces, x, y.device)
            hits = torch.isfinite(result.adversarial_distance)
            distance = torch.where(correct, torch.inf, 0.0).double().cpu()
            distance[rows[hits].cpu()] = exact_distance(self.threat, x[rows[hits]], result.x_adv[hits])
            nothing = torch.zeros_like(correct)
            origin = np.full(len(y), "", dtype=object)
            origin[_numpy(rows)] = result.origin
            self.columns |= {
                f"{name}.attacked": _scatter(rows, torch.ones_like(rows).bool(), nothing),
                f"{name}.success": _scatter(rows, result.success, ~correct),
                f"{name}.distance": _numpy(distance),
                f"{name}.forwards": _scatter(rows, result.forwards, nothing.long()),
                f"{name}.backwards": _scatter(rows, result.backwards, nothing.long()),
                f"{name}.origin": origin,
            }
            self.adversarial[name] = rows[hits].cpu(), result.x_adv[hits].cpu()
        if attacks:
            self.doubts += suspicions(self.subject.classifier, x, y, self.threat)
        if self.subject.classifier is self.model:  # a vote under noise is no function of features
            how = {"seed": self.seed, "batch_size": self.batch_size}
            self.doubts += hidden_gradients(self.model, x, self.threat, self._passes(), **how)

    def audit(self, share: float) -> None:
        """Attack the certified examples that are nearest to failing, for a share of the passes so far."""
        claims = [self._claim(name, proof) for name, proof in self.proofs.items()]
        if not share or not claims:
            return
        spent = self._passes() + len(self.y) * (1 + len(self.guarantees))
        margins = {name: proof.margin for name, proof in self.proofs.items() if proof.margin is not None}
        rows, radii = closest_first(claims, margins, self.threat.eps), radii_of(claims, self.threat, self.x)
        with self._timed("audit"):
            each = CHEAP.passes(self.classes)
            rows = affordable(rows, radii, share * spent, each, FEWEST * len(claims))
            self.audited = audit(
                self.watch, claims, self.x, self.y, rows, seed=self.seed, batch_size=self.batch_size
            )
        self.report(f"audit of {len(rows)} certified examples", -1, 0)

    def _passes(self) -> int:
        """Of the attacks, forward and backward."""
        return sum(int(c.sum()) for name, c in self.columns.items() if name.endswith((".forwards", ".backwards")))

    def _piece(self, name: str, attack: Attack, piece: Tensor, store: Store | None) -> AttackResult:
        x, y, threat, subject = self.x[piece], self.y[piece], self.threat, self.subject
        known = fingerprint(self.model, x, y, piece, threat, self.seed, attack, subject.noise)
        result = None if store is None else store.get(f"{attack.name}-{known}")
        if result is None:
            numbers, how = piece.cpu(), {"seed": self.seed, "batch_size": self.batch_size}
            found = attack(subject.classifier, x, y, threat, indices=numbers, **how)
            result = subject.confirmed(found, x, y, threat)
            if store is not None:
                store.put(f"{attack.name}-{known}", result)
        hits = torch.isfinite(result.adversarial_distance).nonzero().squeeze(1)
        x_adv = result.x_adv[hits].to(x.device)
        hits = hits.to(x.device)
        self._check(name, Points(x[hits], y[hits], x_adv, piece[hits]), wrong=True)
        return result

    def _check(self, by: str, points: Points, *, wrong: bool) -> Tensor:
        """Ring where the points contradict what is certified of their examples."""
        claims = [self._claim(name, proof).take(points.numbers) for name, proof in self.proofs.items()]
        return self.watch.check(by, claims, points, wrong=wrong)

    def _claim(self, name: str, proof: Certificate) -> Claim:
        """What is certified of all examples, by the certificate itself or when it was asked further."""
        further = torch.from_numpy(self.columns[f"{name}.radius"]).to(proof.radius)
        radius = torch.maximum(proof.radius, further)
        radius = torch.where(proof.verified, radius.clamp(min=self.threat.eps), radius)
        return Claim(name, radius.masked_fill(~proof.verified & (radius <= 0), -1.0), proof.arithmetic)

    def measure_steepness(self, examples: int) -> None:
        """The local Lipschitz constant around the first few, of a network as it is."""
        count = min(examples, len(self.y))
        if not count or self.subject.classifier is not self.model or self.threat.eps == 0 or self.threat.discrete:
            return
        with self._timed("local_lipschitz"):
            x, size = self.x[:count], self.batch_size
            value = local_lipschitz(self.model, x, self.threat, seed=self.seed, upper=False, batch_size=size).value
        self.columns["local_lipschitz"] = np.full(len(self.y), np.nan)
        self.columns["local_lipschitz"][:count] = _numpy(value)
        self.steep = {"mean": value.mean().item(), "max": value.max().item(), "examples": count}
        self.report(f"local Lipschitz constant: mean {self.steep['mean']:.4g} of {count} examples", -1, 0)

    def evaluation(self, certifiers: dict[str, Certifier], attacks: dict[str, Attack]) -> Evaluation:
        """The table, and what follows from it."""
        table = pd.DataFrame(self.columns)
        summary = summarise(table, self.threat, self.guarantees, self.seconds)
        if self.arithmetic:
            summary["arithmetic"] = self.arithmetic
        for name in summary.get("sampling", {}):
            summary["sampling"][name] |= certifiers[name].model_dump(exclude={"name"})
        if self.steep:
            summary["local_lipschitz"] = self.steep
        doubts = [
            *excessive_radius(self.threat, self.x),
            *randomness(self.model, self.x),
            *batch_dependence(self.model, self.x),
        ]
        sure = table[table["prediction"] >= 0]  # what abstains is no class
        if len(sure):
            doubts += [*misplaced_labels(sure), *unpredicted_classes(sure)]
        if self.proofs:
            summary["float32_disagrees"] = len(self.watch.disagreements)
            doubts += disagreement(self.watch.disagreements)
        if self.audited is not None:
            summary["audit"] = asdict(self.audited)
        summary["warnings"] = [*doubts, *self.doubts, *blind_successes(table, attacks)]
        each = pd.DataFrame(self.each)
        return Evaluation(table, summary, self.subject.classifier, each, self.adversarial, certifiers)

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


def in_vain(columns: Container[str], name: str) -> str | None:
    """The column of a certifier's smallest radius that was asked, or in a search tried, in vain."""
    return next((f"{name}.{what}" for what in ("unproven", "above") if f"{name}.{what}" in columns), None)


def ask_at(
    certifier: Certifier,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    radii: Sequence[float],
    radius: np.ndarray,
    unproven: np.ndarray,
    *,
    seed: int = 0,
    batch_size: int = 256,
) -> None:
    """Ask a certifier at further radii, about those examples where what is known leaves them open.

    Args:
        radius, unproven: of each example the largest radius that was verified and the smallest that was asked or
            tried in vain, (N,) float64; what is found is written into them.
    """
    for eps in sorted(radius for radius in radii if radius > 0):
        rows = np.flatnonzero((radius < eps) & (eps < unproven))
        if not len(rows):
            continue
        here = torch.from_numpy(rows).to(x.device)
        found = certifier(model, x[here], y[here], threat.with_eps(eps), seed=seed, batch_size=batch_size)
        holds = _numpy(found.verified)
        radius[rows[holds]], unproven[rows[~holds]] = eps, eps


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
    report(f"{name} ({spent} samples)" if spent else name, -1, left)


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


def _numpy(tensor: Tensor) -> Any:
    return tensor.cpu().numpy().copy()


def _scatter(rows: Tensor, values: Tensor, default: Tensor) -> Any:
    """The values in their rows, the default elsewhere."""
    return _numpy(default.index_put((rows,), values))
