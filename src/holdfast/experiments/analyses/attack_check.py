"""Whether the attacks of a run are any good on its network."""

from __future__ import annotations

import pandas as pd
from pydantic import NonNegativeInt, PositiveInt

from holdfast.analysis.attack_check import AttackCheck, Problems
from holdfast.attacks import Attack
from holdfast.component import distinct_labels
from holdfast.experiments.analyses.analysis import Findings, ModelAnalysis, Subject

GOOD, POOR = 0.9, 0.5
"""Rates from which an attack is called good, and below which poor."""


class AttackCheckAnalysis(ModelAnalysis, name="attack-check"):
    """How often each attack of the run finds adversarial examples that are there by construction (Zimmermann et
    al., 2022): around each image the head gives way to a linear read-out that has one in the ball."""

    examples: PositiveInt = 50
    """The first so many test images."""
    attacks: list[Attack] = []
    """Attacks to check; those of the run by default."""
    inner: PositiveInt = 64
    """Random points of each ball that keep the image's class."""
    draws: NonNegativeInt = 200
    """Random points of each ball that random search tries."""

    def of(self, subject: Subject) -> Findings:
        attacks = self.attacks or subject.attacks
        if not attacks:
            raise ValueError("the run's evaluation has no attacks: name some, as attacks=[pgd]")
        x = subject.x[: self.examples]
        problems = Problems(subject.model, x, subject.threat, inner=self.inner)
        at_random = problems.at_random(self.draws)
        made, count = problems.made, int(problems.made.sum())
        table = {"index": range(len(x)), "made": made.tolist(), "random search": at_random.tolist()}
        summary = [(f"made, by the {problems.on}", f"{count} of {len(x)}")]
        if not count:
            summary.append(
                ("", f"nothing can be said: the {problems.on} do not change enough within {subject.threat}")
            )
            return Findings(summary, {"images": pd.DataFrame(table)}, {})
        summary.append((f"random search, {self.draws} points", f"finds {int(at_random.sum())} of {count}"))
        for name, attack in zip(distinct_labels(attacks), attacks, strict=True):
            found = problems.check(attack, at_random)
            table[name] = found.found.tolist()
            summary.append((name, f"finds {int(found.found.sum())} of {count}: {_in_words(found)}"))
        return Findings(summary, {"images": pd.DataFrame(table)}, {})


def _in_words(found: AttackCheck) -> str:
    """What a rate says of the attack."""
    if found.rate >= GOOD:
        return "what it leaves standing says something of the network"
    if found.rate >= POOR:
        return "some of what it leaves standing may fall to a stronger attack; give it more steps or restarts"
    worse = ", no better than chance" if found.rate <= found.random_rate else ""
    return (
        f"it misses most of what is there{worse}, so that what it leaves standing says little of the network. Its "
        "steps are too few, or the gradients are hidden, as by rounding or noise: run square and autoattack"
    )
