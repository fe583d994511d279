"""One table per evaluation: certify first, attack what is not certified, and ring if the two disagree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from torch import Tensor, nn

from holdfast.attacks import Attack
from holdfast.certify import Certifier
from holdfast.component import distinct_labels
from holdfast.evaluation.making import Making
from holdfast.evaluation.stages import Clock, Store
from holdfast.evaluation.subject import common_subject
from holdfast.inference import check_inputs, device_of, door
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
    ``NAME.origin`` (restart and step that found it), ``NAME.forwards``, ``NAME.backwards``, and ``NAME.odd`` where
    some gradient on its way was NaN or inf (see ``AttackResult.odd``). A certifier that looks for counterexamples
    has ``NAME.success``, ``NAME.distance`` and ``NAME.origin`` of them, as an attack has. And, where asked for,
    ``local_lipschitz``, the largest quotient found around the example, NaN where none was sought."""
    summary: dict[str, Any]
    """``examples``, ``threat``, ``standard``; ``attacked`` and ``certified`` per name; ``bracket``, the
    accuracy under all attacks, counterexamples of certifiers among them, and under any certificate, whose
    ``bracket_guarantee`` is that of all together; ``not_surely_wrong`` of a smoothed classifier; ``counts``,
    ``intervals`` (95 %), ``passes``, ``guarantees``, ``arithmetic`` (of what network the deterministic ones are
    true), ``warnings`` (reasons to doubt the numbers), ``seconds`` and their ``timings`` per stage; where asked
    for ``local_lipschitz``: mean and largest quotient, and of how many examples; beside deterministic
    certificates ``float32_disagrees``: around how many examples float32 errs within a certified radius, where
    the network as a function of real numbers is right, as the certificate says, and ``audit``: examples,
    passes, the smallest margin seen, and where."""
    subject: nn.Module = field(repr=False)
    """The classifier that all of it is about: the model, or what the certifiers make of it (its smoothed one)."""
    seconds: pd.DataFrame
    """What each example cost each certifier that knows it; beside the table, which is the same every time."""
    adversarial: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """For each attack the numbers (M,) of the right examples it found an adversarial for, and those, (M, ...)."""
    certifiers: dict[str, Certifier] = field(default_factory=dict)
    """By the names that they have in the table."""


RADII_OF_SAMPLES = "its radii are known with a tolerance, or mode=fixed"


@door
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
    minutes: float | None = None,
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
            many examples. Left out where it means nothing: for a smoothed classifier, in l_0, at eps = 0, and of
            logits that are masked with −inf or in half precision.
        minutes: certify and attack for so long and no longer, where that decides most (see ``stages.spend``):
            blocks of examples go through certifiers and attacks in their order; the last block is finished. What
            was not asked by then is neither certified nor broken, so that the two accuracies bracket the truth all
            the same. Where something is left, further radii and local Lipschitz constants are, too. With a store
            the next call goes on.
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
    if minutes is not None and minutes < 0:
        raise ValueError(f"minutes must be ≥ 0, given {minutes}")
    clock = None if minutes is None else Clock.of(minutes)
    labels = check_inputs(images, labels, threat)
    device, subject = device_of(model, images.device), common_subject(model, provers)
    making = Making(
        model,
        subject,
        images.to(device),
        labels.to(device),
        threat,
        named_certifiers,
        named_attacks,
        attack_certified=attack_certified,
        seed=seed,
        batch_size=batch_size,
        report=on_progress,
        store=store,
    )
    hurried = clock is not None
    if clock is not None:
        making.squeeze(clock)
    making.certify(radii, hurried=hurried)
    making.attack(hurried=hurried)
    making.audit(audit)
    if not making.left:
        making.measure_steepness(lipschitz_examples)
    table, summary = making.finished()
    each = pd.DataFrame(making.each)
    return Evaluation(table, summary, subject.classifier, each, making.adversarial, named_certifiers)
