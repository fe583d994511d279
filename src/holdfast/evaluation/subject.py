"""The classifier that an evaluation is about: the network as it is, or its vote under noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from holdfast.attacks import AttackResult
from holdfast.certify import Certificate, Certifier, SmoothedClassifier
from holdfast.certify.smoothed import sure
from holdfast.threat import Threat


@dataclass(frozen=True)
class Answers:
    """What a classifier says of the unperturbed examples."""

    prediction: Tensor
    """(N,) int64; −1 where it abstains."""
    correct: Tensor
    """Right, (N,) bool; an abstention is not."""
    further: dict[str, Tensor] = field(default_factory=dict)
    """Columns beside these."""


class Subject:
    """A network as it is: the largest logit."""

    def __init__(self, classifier: nn.Module) -> None:
        self.classifier = classifier
        self.noise: object = None
        """What tells it apart from the network itself."""

    def answers(
        self, logits: Tensor, x: Tensor, y: Tensor, certificates: Sequence[Certificate], seed: int
    ) -> Answers:
        """Of each example.

        Args:
            logits: the network's own.
            certificates: those of this classifier.
        """
        prediction = logits.argmax(1)
        return Answers(prediction, prediction == y)

    def confirmed(self, result: AttackResult, x: Tensor, y: Tensor, threat: Threat) -> AttackResult:
        """An attack's result as far as it holds."""
        return result


class SmoothedSubject(Subject):
    """A vote under noise: its class is that of the certificates, which may abstain (Cohen et al., 2019).

    An example is right where a certificate is sure of its class at radius 0; an estimate has a say where there is
    no certificate. Beside it stands ``not_surely_wrong``: 1,000 votes leave the label possible.
    """

    classifier: SmoothedClassifier

    def __init__(self, classifier: SmoothedClassifier) -> None:
        super().__init__(classifier)
        self.noise = classifier.noise

    def answers(
        self, logits: Tensor, x: Tensor, y: Tensor, certificates: Sequence[Certificate], seed: int
    ) -> Answers:
        prediction, correct = torch.full_like(y, -1), torch.zeros_like(y, dtype=torch.bool)
        sampled = [one for one in certificates if one.guarantee != "estimate"]
        for one in sampled or certificates:
            error = torch.tensor([word == "error" for word in one.status], device=y.device)
            unsure = error if one.abstained is None else error | one.abstained
            own = one.prediction.masked_fill(unsure, -1)
            prediction = torch.where(prediction < 0, own, prediction)
            correct |= own == y
        prediction = torch.where(correct, y, prediction)  # where two certificates are sure of different classes
        known = sure(self.classifier.votes(x, seed=seed))
        return Answers(prediction, correct, {"not_surely_wrong": (known == y) | (known < 0) | correct})

    def confirmed(self, result: AttackResult, x: Tensor, y: Tensor, threat: Threat) -> AttackResult:
        return self.classifier.confirmed(result, x, y, threat)


def subject_of(classifier: nn.Module) -> Subject:
    """The subject that a classifier is."""
    return SmoothedSubject(classifier) if isinstance(classifier, SmoothedClassifier) else Subject(classifier)


def common_subject(model: nn.Module, certifiers: Sequence[Certifier]) -> Subject:
    """The one classifier that all certificates are about.

    Raises:
        ValueError: they are about different ones.
    """
    found = [subject_of(certifier.subject(model)) for certifier in certifiers] or [Subject(model)]
    if any(one.noise != found[0].noise for one in found):
        raise ValueError(
            "certifiers of a network, or of its vote under one noise or another, speak of different classifiers: "
            "evaluate them one by one"
        )
    return found[0]
