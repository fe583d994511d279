"""Certificate and Certifier: what every certification method takes and returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from holdfast.bounds.graph import trace
from holdfast.bounds.operators import Graph
from holdfast.bounds.rounding import Arithmetic
from holdfast.component import Component
from holdfast.inference import check_inputs, check_logits, door, frozen_eval, plain_arithmetic, predict
from holdfast.memory import in_pieces
from holdfast.threat import Threat

Tell = Callable[[int, int], None]
"""(examples left, noisy samples spent so far)."""


class SoundnessError(RuntimeError):
    """An attack broke an example that was certified in the same threat model: one of the two is wrong."""

    def __init__(self, message: str, example: int, x: Tensor, x_adv: Tensor) -> None:
        super().__init__(message)
        self.example, self.x, self.x_adv = example, x, x_adv


@dataclass(frozen=True)
class Certificate:
    """What is guaranteed of each of N examples."""

    prediction: Tensor
    """The model's class for the unperturbed input, (N,) int64."""
    verified: Tensor
    """Right, and right on the whole threat set, (N,) bool."""
    radius: Tensor
    """The largest radius found for which the example is verified, (N,) float64 in input units: at least eps where
    and only where verified, 0 where the prediction is wrong, inf where nothing in the box changes it. The closed
    ball of this radius is meant."""
    status: list[str]
    """"verified", "undecided", "refuted" (there is a counterexample), "wrong" (the clean prediction is) or "error"
    (a bound or a logit is NaN or inf)."""
    guarantee: str
    """"deterministic", "probabilistic(alpha)" or "estimate". Probabilities are of the noise that the certifier says
    it draws; what that assumes stands at the top of ``holdfast/certify/smoothing.py``."""
    arithmetic: Arithmetic | None = None
    """What a deterministic guarantee is about: the network as a function of ``real`` numbers, or what torch
    computes in ``float32``; the rounding of its own computation is accounted for in either."""
    unproven: Tensor | None = None
    """The smallest radius that was asked in vain, (N,) float64, inf where none was: of those between ``radius`` and
    it nothing is known. None where the method's own ``radius`` was found, to within its tolerance."""
    above: Tensor | None = None
    """Where the radius was searched, the smallest that was tried in vain, (N,) float64, inf where none was."""
    margin: Tensor | None = None
    """The lowest margin bound on the threat set, (N,), where the method has one."""
    excluded: Tensor | None = None
    """Classes j with z_y > z_j proven on the whole threat set, (N, K) bool: a wrong answer there is one of the
    others. None where the method tells no classes apart."""
    method: list[str] | None = None
    """By which of several methods each example was judged."""
    seconds: Tensor | None = None
    """Spent on each example, (N,) float64: its share of the batches it was in."""
    samples: Tensor | None = None
    """Noisy copies spent on each example, (N,) int64, by a certifier that samples."""
    abstained: Tensor | None = None
    """Where a certifier that samples is not sure of any class, (N,) bool."""
    counterexample: Tensor | None = None
    """Of a certifier that looks for them: where refuted, an input of the threat set that the model gets wrong,
    (N, ...); elsewhere NaN."""


def just_below(radius: Tensor) -> Tensor:
    """The next smaller numbers, but at least 0: what holds within an open ball holds within these closed ones."""
    return torch.nextafter(radius, torch.zeros_like(radius)).clamp(min=0)


def strictly_within(radius: Tensor) -> Tensor:
    """Closed balls in which a margin is positive that is so up to this radius, but not on it; −1 for none."""
    return torch.where(radius > 0, just_below(radius), -1.0)


class Examples(NamedTuple):
    """A batch to certify, and what the network answers on it."""

    x: Tensor
    """(N, ...), in the threat's box."""
    y: Tensor
    """(N,) int64."""
    logits: Tensor
    """(N, K); NaN or inf make an error of the example, whatever is found of it."""

    @property
    def right(self) -> Tensor:
        """(N,) bool."""
        return (self.logits.argmax(1) == self.y) & self.logits.isfinite().all(1)


@dataclass(frozen=True)
class Findings:
    """What a method finds of N examples, before it is asked whether they are right: (N,) each."""

    radius: Tensor
    """The prediction holds within it, float64: at least eps where it holds on the threat set, and below 0 where it
    is not proven of the input itself."""
    prediction: Tensor | None = None
    """The class, where it is not that of the network's largest logit."""
    error: Tensor | None = None
    """Where a bound is NaN or inf."""
    above: Tensor | None = None
    margin: Tensor | None = None
    excluded: Tensor | None = None
    """See ``Certificate``; of a wrong example it is not read."""
    method: list[str] | None = None
    seconds: Tensor | None = None
    samples: Tensor | None = None
    abstained: Tensor | None = None
    counterexample: Tensor | None = None

    @property
    def columns(self) -> dict[str, Any]:
        """Those that the method has, by their names."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    def take(self, rows: Tensor) -> Findings:
        """Those of some examples, by their places."""

        def take(column: Any) -> Any:
            if isinstance(column, list):
                return [column[row] for row in rows.tolist()]
            return None if column is None else column[rows.to(column.device)]

        return Findings(**{field.name: take(getattr(self, field.name)) for field in fields(self)})

    @classmethod
    def joined(cls, parts: list[Findings]) -> Findings:
        """Those of several pieces, one after the other."""

        def join(columns: list[Any]) -> Any:
            if isinstance(columns[0], list):
                return [entry for column in columns for entry in column]
            return None if columns[0] is None else torch.cat(columns)

        return cls(**{field.name: join([getattr(part, field.name) for part in parts]) for field in fields(cls)})


Keep = Callable[[Tensor, Certificate], None]
"""(the places of some examples that are finished, (M,) int64 on the CPU, what is certified of them)."""


def _fault(places: Tensor, columns: dict[str, Any], left: Tensor, names: set[str]) -> str | None:
    """In words, what is wrong with a piece of findings.

    Args:
        left: the examples of which nothing is found yet, (N,) bool.
        names: of the first piece's columns.
    """
    if "prediction" not in columns:
        return "a piece has no prediction"
    if some := names.symmetric_difference(columns):
        return f"some pieces alone have {', '.join(sorted(some))}"
    if odd := {name: len(column) for name, column in columns.items() if len(column) != len(places)}:
        return f"a piece of {len(places)} examples has columns of other lengths: {odd}"
    if not torch.isin(places, left.nonzero()).all() or len(places.unique()) < len(places):
        return f"an example is found twice, or is none of the {len(left)}"
    return None


def by_class(others: Tensor, y: Tensor) -> Tensor:
    """Whether something holds of each class but its own, (N, K) bool, from the K − 1 others in ascending order."""
    own = torch.zeros(len(y), others.shape[1] + 1, dtype=torch.bool, device=y.device).scatter(1, y[:, None], True)
    return torch.zeros_like(own).masked_scatter(~own, others)


class Certifier(Component, family="certifiers"):
    """Proves predictions constant on the threat set around each input.

    A member implements ``prover``, of the network itself, or ``findings``, of what it makes of the network.
    """

    def subject(self, model: nn.Module) -> nn.Module:
        """The classifier that the certificates speak of, where it is another one than the model."""
        return model

    @property
    def in_training(self) -> Certifier:
        """What answers in its place after each epoch: itself, or where that is too dear what it begins with."""
        return self

    @property
    def knows_radii(self) -> bool:
        """Whether it answers about radii other than the threat's eps, when it is asked."""
        return True

    @property
    def finds_radii(self) -> bool:
        """Whether its ``radius`` is the largest it can find; otherwise it says of eps alone whether it holds."""
        return True

    @property
    def brief(self) -> Certifier:
        """What stands for it where it would have to run many times, as at the radii of a curve, or in a rehearsal:
        itself, or where it takes its time the same in less."""
        return self

    @property
    def promise(self) -> str:
        """What its certificates are (see ``Certificate.guarantee``)."""
        return "deterministic"

    @property
    def _arithmetic(self) -> Arithmetic | None:
        """What they are about, where they are proofs by arithmetic."""
        return None

    @door
    @torch.no_grad()
    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        *,
        seed: int = 0,
        batch_size: int = 256,
        on_progress: Tell | None = None,
        indices: Tensor | None = None,
        on_found: Keep | None = None,
    ) -> Certificate:
        """Certify every example; the model is left exactly as it was.

        Args:
            model: any module from (N, ...) inputs to (N, K) logits; certified in eval mode.
            x: inputs in the threat's box, (N, ...), floating.
            y: labels, (N,) integers in 0..K−1.
            seed: what a sampling certifier draws for an example depends on it and the example's number only.
            batch_size: at most so many examples, or noisy copies of them, at once.
            on_progress: told how many examples are left and how many samples were spent.
            indices: the examples' numbers, (N,); 0..N−1 by default.
            on_found: given every example once, in pieces as they are finished; what it raises ends the work.

        Raises:
            ValueError: inputs or labels that make no sense, or a model the method cannot handle.
        """
        y = check_inputs(x, y, threat)
        if not len(x):
            return Certificate(y, y.bool(), y.double(), [], self.promise, self._arithmetic)
        numbers = torch.arange(len(x)) if indices is None else indices.cpu()
        tell = on_progress or (lambda left, spent: None)
        parts, order = [], []
        with frozen_eval(model), plain_arithmetic(x.device):
            findings = self.findings(model, x, y, threat, seed, batch_size, tell, numbers)
            for places, found in self._pieces(findings, len(x)):
                parts.append(found)
                order.append(places)
                if on_found is not None:
                    on_found(places, self._certificate(found, y[places.to(y.device)], threat))
        return self._certificate(Findings.joined(parts).take(torch.cat(order).argsort()), y, threat)

    def findings(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        seed: int,
        batch_size: int,
        tell: Tell,
        numbers: Tensor,
    ) -> Iterator[tuple[Tensor, Findings]]:
        """What is found of all examples, N ≥ 1, in pieces as they are finished, each with the places of its
        examples, (M,) int64: of the network's own predictions, batch by batch.

        A method of one's own may return one Findings of all; in pieces, each example is in one of them, and all
        have the same columns, the prediction among them.
        """
        prove = self.prover(model, x[:batch_size], threat)

        def proved(places: Tensor) -> Findings:
            batch, labels = x[places.to(x.device)], y[places.to(y.device)]
            logits = predict(model, batch, batch_size)
            check_logits(logits.nan_to_num(), labels)
            # A margin that is too large for the logits' own type is no number either.
            error = ~(logits.amax(1) - logits.amin(1)).isfinite()
            found = prove(Examples(batch, labels, logits))
            error = error if found.error is None else error | found.error
            return replace(found, prediction=logits.argmax(1), error=error)

        for places, found in in_pieces(self.name, len(x), batch_size, proved):
            yield places, found
            tell(len(x) - 1 - int(places[-1]), 0)

    def prover(self, model: nn.Module, x: Tensor, threat: Threat) -> Callable[[Examples], Findings]:
        """What proves a batch after the other; whatever all of them share is made here, once.

        Args:
            x: the first batch.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither a prover nor findings of its own")

    def _pieces(
        self, found: Findings | Iterable[tuple[Tensor, Findings]], count: int
    ) -> Iterator[tuple[Tensor, Findings]]:
        """The pieces of so many examples as they come, places on the CPU; what is whole is one piece.

        Raises:
            ValueError: some example is in none of them or in two, or they have other columns; names the certifier.
        """
        left, names = torch.ones(count, dtype=torch.bool), None
        for places, piece in [(torch.arange(count), found)] if isinstance(found, Findings) else found:
            names = names or set(piece.columns)
            if fault := _fault(places.cpu(), piece.columns, left, names):
                raise ValueError(f"the findings of {type(self).__name__}: {fault}")
            left[places.cpu()] = False
            yield places.cpu(), piece
        if left.any():
            raise ValueError(
                f"the findings of {type(self).__name__}: {int(left.sum())} of {count} examples are left out"
            )

    def _certificate(self, found: Findings, y: Tensor, threat: Threat) -> Certificate:
        """Verified is what is right and has a radius of at least eps."""
        assert found.prediction is not None
        nobody = torch.zeros_like(y, dtype=torch.bool)
        error = nobody if found.error is None else found.error
        known = ~(error | (nobody if found.abstained is None else found.abstained))
        right = known & (found.prediction == y)
        verified = right & (found.radius >= threat.eps)
        against = found.counterexample
        refuted = nobody if against is None else right & ~verified & ~against.flatten(1).isnan().any(1)
        columns = {"error": error, "verified": verified, "wrong": known & ~right, "refuted": refuted}
        status = ["undecided"] * len(y)
        for word, rows in columns.items():
            for row in rows.nonzero().squeeze(1).tolist():
                status[row] = word
        open_from = torch.full_like(found.radius, threat.eps).masked_fill(verified, torch.inf)
        return Certificate(
            found.prediction,
            verified,
            torch.where(right, found.radius.clamp(min=0), 0.0),
            status,
            self.promise,
            self._arithmetic,
            None if self.finds_radii else open_from,
            found.above if self.finds_radii else None,
            found.margin,
            None if found.excluded is None else found.excluded & (right & ~error)[:, None],
            found.method,
            found.seconds,
            found.samples,
            found.abstained,
            against,
        )


class Deterministic(Certifier):
    """What proves by arithmetic, and accounts for the rounding of its own."""

    arithmetic: Arithmetic = "real"
    """Of what network it is true: as a function of ``real`` numbers with exactly these weights, on all real inputs
    of the threat set; or as what torch computes of them in ``float32``, whose rounding the margins must then exceed
    too."""

    @property
    def _arithmetic(self) -> Arithmetic:
        return self.arithmetic

    def traced(self, model: nn.Module, x: Tensor, threat: Threat) -> Graph:
        """The network's operators.

        Raises:
            ValueError: it ends in a softmax, and ``float32`` is asked: its ties are not accounted for.
        """
        graph = trace(model, x, box=threat.interval(x))
        if graph.heads and self.arithmetic == "float32":
            raise ValueError(
                "arithmetic float32 is not stated of a network that ends in softmax, which ties in float32: "
                "certify the logits before it, or arithmetic real"
            )
        return graph
