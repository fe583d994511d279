"""How an evaluation comes about: certificates, attacks and the audit, and the columns of the table that they
make."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from holdfast.analysis.local_lipschitz import local_lipschitz
from holdfast.attacks import Attack, AttackResult
from holdfast.certify import Certificate, Certifier
from holdfast.evaluation.alarm import Claim, Points, Watch, disagreement
from holdfast.evaluation.audit import CHEAP, FEWEST, Audit, affordable, audit, closest_first, radii_of
from holdfast.evaluation.columns import (
    attack_columns,
    certificate_columns,
    nothing,
    numpy,
    reached_columns,
    refutations,
)
from holdfast.evaluation.radii import ask_at, in_vain
from holdfast.evaluation.sanity import (
    batch_dependence,
    blind_successes,
    excessive_radius,
    hidden_gradients,
    misplaced_labels,
    odd_gradients,
    randomness,
    suspicions,
    unpredicted_classes,
)
from holdfast.evaluation.stages import Clock, Keep, Rows, Stage, Store, certificate_of, spend
from holdfast.evaluation.subject import Answers, SmoothedSubject, Subject
from holdfast.evaluation.summary import summarise
from holdfast.evaluation.telling import sometimes, tell_samples
from holdfast.inference import check_logits, fingerprint, frozen_eval, plain_arithmetic, predict
from holdfast.threat import Threat

PIECE = 256
"""Examples attacked in one piece where pieces are kept: between two an evaluation can be cut off without loss."""
WHOLE = 2**28
"""Bytes of examples that are attacked in one piece otherwise, so that a batch is refilled from all that is left."""
BLOCK = 64
"""Examples that a stage is asked about at a time where time is short."""


class Making:
    """One call of ``evaluate``: the columns of its table as they come."""

    def __init__(
        self,
        model: nn.Module,
        subject: Subject,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        certifiers: dict[str, Certifier],
        attacks: dict[str, Attack],
        *,
        attack_certified: bool,
        seed: int,
        batch_size: int,
        report: Callable[[str, int, int], None] | None,
        store: Store | None,
    ) -> None:
        self.model, self.subject, self.x, self.y, self.threat = model, subject, x, y, threat
        self.certifiers, self.attacks, self.attack_certified = certifiers, attacks, attack_certified
        self.seed, self.batch_size, self.store = seed, batch_size, store
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
        self.left: dict[str, int] = {}
        """How many examples each stage was not asked about, where its time was up."""
        with self._timed("standard"), frozen_eval(model), plain_arithmetic(x.device):
            self.logits = predict(model, x, batch_size)
            check_logits(self.logits, y, masks=True)
            known = predict(model, x[:16]) if store is not None else None
        self.correct = self.logits.argmax(1) == y
        self.proven, self.decided = torch.zeros_like(self.correct), torch.zeros_like(self.correct)
        self.excluded = torch.zeros_like(self.logits, dtype=torch.bool)
        """Classes that some deterministic certificate excludes, (N, K)."""
        asked = () if store is None else (model, known, x, y, threat, seed, subject.noise)
        common = fingerprint(*asked)

        def key(one: Certifier | Attack, *further: object) -> str:
            return f"{one.name}-{fingerprint(common, one, *further)}"

        self.proving = {
            name: Stage(name, partial(self._certificate, name), store, key(one)) for name, one in certifiers.items()
        }
        self.attacking = {
            name: Stage(name, partial(self._attacked, name), store, key(one, list(certifiers.values())))
            for name, one in attacks.items()
        }

    def squeeze(self, clock: Clock) -> None:
        """Certify and attack where that decides most, until the time is up."""
        provers = [partial(self._prove_some, stage, clock) for stage in self.proving.values()]
        attackers = [partial(self._attack_some, name) for name in self.attacks]
        if isinstance(self.subject, SmoothedSubject) and provers:  # what it answers follows from its certificates
            spend(provers, len(self.y), BLOCK, clock.part(0.5))
            self.correct = self._answers(self._certificates()).correct
            spend(attackers, len(self.y), BLOCK, clock)
        else:
            spend([*provers, *attackers], len(self.y), BLOCK, clock)

    def _prove_some(self, stage: Stage[Certificate], clock: Clock, rows: Rows) -> int | None:
        new, before = len(stage.missing(rows)), int(self.decided.sum())
        known, found = stage.about(rows, clock)
        if found is not None:
            self._note(known, found)
        if not new:
            return None
        if found is not None:
            here = known.to(self.y.device)
            refuted = torch.tensor([word == "refuted" for word in found.status], device=here.device)
            self.decided[here] |= (found.verified.to(here.device) | refuted) & self.correct[here]
        return int(self.decided.sum()) - before

    def _attack_some(self, name: str, rows: Rows) -> int | None:
        stage, rows = self.attacking[name], self._attackable(name, rows)
        if not len(stage.missing(rows)):
            return None
        before = int(self.decided.sum())
        found = stage.about(rows)[1]
        assert found is not None
        self.decided[rows.to(self.y.device)] |= found.success.to(self.y.device)
        return int(self.decided.sum()) - before

    def _note(self, rows: Rows, certificate: Certificate) -> None:
        """What a deterministic certificate spares the attacks."""
        if certificate.guarantee == "deterministic":
            here = rows.to(self.y.device)
            self.proven[here] |= certificate.verified.to(here.device)
            if certificate.excluded is not None:
                self.excluded[here] |= certificate.excluded.to(here.device)

    def _attackable(self, name: str, rows: Rows) -> Rows:
        """Those that an attack is run on: what is right and not proven, or all of what is right."""
        everything = self.attack_certified or not self.attacks[name].heeds_certificates
        return rows[(self.correct & (~self.proven | everything)).cpu()[rows]]

    def _missing(self, name: str) -> int:
        """How many examples an attack is still to run on."""
        return len(self.attacking[name].missing(self._attackable(name, torch.arange(len(self.y)))))

    def _certificates(self) -> dict[str, Certificate]:
        """Of all examples, as far as they were made."""
        none = torch.full_like(self.y, -1) if isinstance(self.subject, SmoothedSubject) else self.logits.argmax(1)
        return {
            name: certificate_of(stage, none, self.y, self.certifiers[name].promise)
            for name, stage in self.proving.items()
        }

    def _answers(self, certificates: dict[str, Certificate]) -> Answers:
        with self._timed("standard"):
            return self.subject.answers(self.logits, self.x, self.y, list(certificates.values()), self.seed)

    def certify(self, radii: Sequence[float], *, hurried: bool) -> None:
        """What the classifier answers, and what is certified of it.

        Args:
            hurried: nothing more is asked, but for radii where certifiers and attacks have nothing left.
        """
        everyone = torch.arange(len(self.y))
        for name, stage in self.proving.items():
            if hurried:
                self.left |= {name: missing} if (missing := len(stage.missing(everyone))) else {}
            else:
                stage.about(everyone)
        certificates = self._certificates()
        answers = self._answers(certificates)
        self.correct = answers.correct
        self.watch = Watch(self.subject.classifier, self.x, self.threat)
        self.report("standard", int(self.correct.sum()), 0)
        numbers = np.arange(len(self.y))
        self.columns |= {"index": numbers, "label": numpy(self.y), "prediction": numpy(answers.prediction)}
        self.columns |= {"correct": numpy(self.correct)} | {k: numpy(v) for k, v in answers.further.items()}
        for name, certificate in certificates.items():
            self._note(everyone, certificate)
            self._enter(name, certificate)
            if certificate.guarantee == "deterministic":
                self.proofs[name] = certificate
        finished = not hurried or not (self.left or any(self._missing(name) for name in self.attacks))
        for name, certificate in certificates.items():
            if finished and name in self.proofs:
                with self._timed(name):
                    self._ask(name, self.certifiers[name], radii)
            self.report(name, int(certificate.verified.sum()), 0)
        for name, (rows, x_adv) in self.adversarial.items():
            here = rows.to(self.y.device)
            self._check(name, Points(self.x[here], self.y[here], x_adv.to(self.x.device), here), wrong=True)
        wrong = (~self.correct).nonzero().squeeze(1)
        self._check("the model itself", Points(self.x[wrong], self.y[wrong], self.x[wrong], wrong), wrong=True)

    def _certificate(self, name: str, rows: Rows, keep: Keep) -> Certificate:
        certifier, here = self.certifiers[name], rows.to(self.y.device)
        how: dict[str, Any] = {"seed": self.seed, "batch_size": self.batch_size}
        how["on_progress"] = sometimes(partial(tell_samples, self.report, name), len(rows))
        how = _understood(certifier, how | {"indices": rows, "on_found": keep})
        with self._timed(name):
            return certifier(self.model, self.x[here], self.y[here], self.threat, **how)

    def _enter(self, name: str, certificate: Certificate) -> None:
        """The columns of a certificate, and where it has counterexamples those of an attack by its name."""
        self.guarantees[name] = certificate.guarantee
        if certificate.arithmetic is not None:
            self.arithmetic[name] = certificate.arithmetic
        self.columns |= certificate_columns(name, certificate, self.correct, self.threat.eps)
        if certificate.seconds is not None:
            self.each[name] = numpy(certificate.seconds)
        if certificate.counterexample is not None:
            how = self.x, self.y, self.threat, self.batch_size
            self._enter_reached(name, *refutations(name, certificate, self.subject.classifier, *how))

    def _ask(self, name: str, certifier: Certifier, radii: Sequence[float]) -> None:
        if (vain := in_vain(self.columns, name)) and len(radii):
            known = self.columns[f"{name}.radius"], self.columns[vain]
            ask = partial(ask_at, certifier, self.model, self.x, self.y, self.threat, radii, *known)
            broken = self.columns.get(f"{name}.distance", np.inf)
            ask(broken=broken, seed=self.seed, batch_size=self.batch_size)

    def attack(self, *, hurried: bool) -> None:
        """Attack what is right and not proven, or all of what is right; ring where it should not fall.

        Args:
            hurried: nothing more is attacked.
        """
        x, y, correct = self.x, self.y, self.correct
        for name, stage in self.attacking.items():
            wanted = self._attackable(name, torch.arange(len(y)))
            known, found = stage.found(wanted)
            if found is not None:
                self._ring(name, known, found)
            standing = int(correct.sum()) - (0 if found is None else int(found.success.sum()))
            left = stage.missing(wanted)
            if found is not None:
                self.report(name, standing, len(left))
            for piece in left.split(self._piece) if len(left) and not hurried else ():
                new = stage.about(piece)[1]
                assert new is not None
                self._ring(name, piece, new)
                standing -= int(new.success.sum())
                self.report(name, standing, len(left) - int((left <= piece[-1]).sum()))
            rows, result = stage.found(wanted)
            if len(rows) < len(wanted):
                self.left[name] = len(wanted) - len(rows)
            self._enter_reached(name, rows.to(y.device), result or nothing(x), passes=True)
        if self.attacking:
            self.doubts += suspicions(self.subject.classifier, x, y, self.threat)
        if self.subject.classifier is self.model:  # a vote under noise is no function of features
            how = {"seed": self.seed, "batch_size": self.batch_size}
            self.doubts += hidden_gradients(self.model, x, self.threat, self._passes(), **how)

    def _passes(self) -> int:
        """Of the attacks, forward and backward."""
        return sum(int(c.sum()) for name, c in self.columns.items() if name.endswith((".forwards", ".backwards")))

    @property
    def _piece(self) -> int:
        """Examples that are attacked in one piece."""
        return PIECE if self.store is not None else max(PIECE, WHOLE // (self.x[0].numel() * self.x.element_size()))

    def _attacked(self, name: str, rows: Rows, keep: Keep) -> AttackResult:
        here, attack, subject, threat = rows.to(self.y.device), self.attacks[name], self.subject, self.threat
        x, y = self.x[here], self.y[here]
        how: dict[str, Any] = {"seed": self.seed, "batch_size": self.batch_size, "indices": rows}
        if self.excluded[here].any() and attack.heeds_certificates:
            how["open_targets"] = ~self.excluded[here]
        how = _understood(attack, how)
        with self._timed(name):
            return subject.confirmed(attack(subject.classifier, x, y, threat, **how), x, y, threat)

    def _ring(self, name: str, rows: Rows, result: AttackResult) -> None:
        """Where an attack found what contradicts a certificate."""
        hits = torch.isfinite(result.adversarial_distance).nonzero().squeeze(1)
        here = rows.to(self.y.device)[hits.to(self.y.device)]
        x_adv = result.x_adv[hits].to(self.x.device)
        self._check(name, Points(self.x[here], self.y[here], x_adv, here), wrong=True)

    def _enter_reached(self, name: str, rows: Tensor, result: AttackResult, *, passes: bool = False) -> None:
        """The columns and adversarial images of an attack on some of the examples.

        Args:
            passes: it tells of its passes, and of whom it attacked.
        """
        columns = attack_columns if passes else reached_columns
        self.columns |= columns(name, rows, result, self.x, self.correct, self.threat)
        hits = torch.isfinite(result.adversarial_distance)
        self.adversarial[name] = rows.cpu()[hits.cpu()], result.x_adv[hits].cpu()

    def audit(self, share: float) -> None:
        """Attack the certified examples that are nearest to failing, for a share of the passes so far."""
        claims = [self._claim(name, proof) for name, proof in self.proofs.items()]
        if not share or not claims:
            return
        spent = self._passes() + len(self.y) * (1 + len(self.guarantees))
        margins = {name: proof.margin for name, proof in self.proofs.items() if proof.margin is not None}
        rows, radii = closest_first(claims, margins, self.threat.eps), radii_of(claims, self.threat, self.x)
        with self._timed("audit"):
            each = CHEAP.passes(self.logits.shape[1])
            rows = affordable(rows, radii, share * spent, each, FEWEST * len(claims))
            self.audited = audit(
                self.watch, claims, self.x, self.y, rows, seed=self.seed, batch_size=self.batch_size
            )
        self.report(f"audit of {len(rows)} certified examples", -1, 0)

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
        slopes = bool(self.logits.isfinite().all()) and torch.finfo(self.logits.dtype).bits >= 32
        slopes = slopes and self.subject.classifier is self.model
        if not count or not slopes or self.threat.eps == 0 or self.threat.discrete:
            return
        with self._timed("local_lipschitz"):
            x, size = self.x[:count], self.batch_size
            value = local_lipschitz(self.model, x, self.threat, seed=self.seed, upper=False, batch_size=size).value
        self.columns["local_lipschitz"] = np.full(len(self.y), np.nan)
        self.columns["local_lipschitz"][:count] = numpy(value)
        self.steep = {"mean": value.mean().item(), "max": value.max().item(), "examples": count}
        self.report(f"local Lipschitz constant: mean {self.steep['mean']:.4g} of {count} examples", -1, 0)

    def finished(self) -> tuple[pd.DataFrame, dict[str, Any]]:
        """The table, and the summary that follows from it."""
        table = pd.DataFrame(self.columns)
        summary = summarise(table, self.threat, self.guarantees, self.seconds)
        if self.arithmetic:
            summary["arithmetic"] = self.arithmetic
        for name in summary.get("sampling", {}):
            summary["sampling"][name] |= self.certifiers[name].model_dump(exclude={"name"})
        if self.left:
            summary["not_reached"] = self.left
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
        summary["warnings"] = [*doubts, *self.doubts, *odd_gradients(table), *blind_successes(table, self.attacks)]
        return table, summary

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


def _understood(call: Callable[..., Any], how: dict[str, Any]) -> dict[str, Any]:
    """Those arguments that somebody's call knows: a stranger's may be older than they are."""
    return {name: value for name, value in how.items() if name in inspect.signature(call).parameters}
