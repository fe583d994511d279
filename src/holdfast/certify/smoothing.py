"""Randomised smoothing: the class that wins the vote under noise, and how far it stays so.

The smoothed classifier g(x) is the class that the network f gives most often to x + noise. If it does so with
probability p > ½, then g is constant within σ Φ⁻¹(p) in l_2 for Gaussian noise of standard deviation σ (Cohen
et al., 2019), and within 2 √3 σ (p − ½) in l_1 for uniform noise of that deviation (Lee et al., 2019). Samples
bound p from below.

Both theorems are of real noise. A float that is added to an input is rounded, differently for every input: the sum
is no longer the same noise around another centre, and certificates can be broken (Jin et al., 2022). On a grid sums
are exact, and inputs that differ by r differ by little more once they are rounded (``grid_bits``). What is assumed
then is that the draws, rounded to the grid, fall as rounded real noise does: that torch's generator draws what it
says, and that what its last bits and its tails lack (32 random bits reach 6.7 σ) changes no count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, Self

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from holdfast.certify.certificate import Certifier, Findings, Tell, just_below
from holdfast.certify.confidence import anytime_lower, clopper_pearson_lower, log_evidence
from holdfast.certify.smoothed import SmoothedClassifier
from holdfast.certify.votes import CHUNK, Task, VoteNoise, Voter
from holdfast.component import PositiveNumber
from holdfast.inference import check_logits, predict
from holdfast.threat import Threat


def plug_in_radius(counts: Tensor, y: Tensor, sigma: float) -> Tensor:
    """σ / 2 (Φ⁻¹(p_y) − Φ⁻¹(p_2)) of vote shares clipped to [0.01, 0.99], (N,); negative where y does not win.

    An estimate, no certificate: nothing accounts for the samples' chance (Prach & Lampert, 2024).

    Args:
        counts: votes, (N, K).
        y: labels, (N,).
    """
    shares = counts.double() / counts.sum(1, keepdim=True)
    own = torch.nn.functional.one_hot(y, counts.shape[1]).bool()
    both = torch.stack([shares[own], shares.masked_fill(own, -1).amax(1)]).clamp(0.01, 0.99)
    quantiles = torch.special.ndtri(both)
    return sigma / 2 * (quantiles[0] - quantiles[1])


class _Smoothing(Certifier):
    """What the smoothing certifiers share."""

    sigma: PositiveNumber = 0.25
    """Standard deviation of the noise, in input units."""
    grid_bits: int | None = Field(default=20, ge=8, le=20)
    """Round inputs and noise to multiples of 2^−bits, which makes their sum exact: the noise is then the same for
    every input. Radii shrink by √d 2^−bits (l_1: d 2^−bits). Without it the guarantee is that of real noise, while
    what a float adds depends on what it is added to (Jin et al., 2022)."""

    def subject(self, model: nn.Module) -> nn.Module:
        return SmoothedClassifier(model, self, self.noise_model)

    @property
    def noise_model(self) -> VoteNoise:
        return VoteNoise("gaussian", self.sigma, self.grid_bits)


class SmoothingCertifier(_Smoothing, name="smoothing"):
    """Randomised smoothing (Cohen et al., 2019), with confidence 1 − α for each example.

    ``n0`` samples select the class, others bound its probability from below. ``sequential`` looks after every
    chunk of samples, which e-processes allow at any time, and stops once two things are decided: whether the class
    wins at all, or else the certifier abstains, and whether the radius exceeds the threat's eps (or is known to
    ``tolerance``). Without a tolerance, ``radius`` is then eps or 0 and says nothing of other radii. ``fixed``
    takes all ``n`` samples and the bound of Clopper and Pearson. l_2 threats want Gaussian noise, l_1 uniform
    noise. The prediction is that of the smoothed classifier; where its class does not win surely the certifier
    abstains.
    """

    n0: PositiveInt = 100
    """Samples for the selection of the class."""
    n: PositiveInt = 100_000
    """Samples for the estimate: exactly so many (``fixed``), or at most."""
    alpha: float = Field(default=0.001, gt=0, lt=1)
    """Probability that a certificate is wrong, for each example."""
    mode: Literal["sequential", "fixed"] = "sequential"
    """When sampling ends."""
    tolerance: PositiveNumber | None = None
    """Go on until the radius is known to this, in input units; sequential mode only."""
    noise: Literal["gaussian", "uniform"] = "gaussian"
    """``gaussian`` for l_2, ``uniform`` for l_1."""

    @model_validator(mode="after")
    def _make_sense_together(self) -> Self:
        if self.tolerance and self.mode == "fixed":
            raise ValueError("tolerance belongs to mode=sequential; fixed takes all n samples")
        return self

    @property
    def title(self) -> str:
        return f"smoothing σ={self.sigma:g}"

    @property
    def promise(self) -> str:
        return f"probabilistic({self.alpha:g})"

    @property
    def knows_radii(self) -> bool:
        return self.mode == "fixed" or self.tolerance is not None

    @property
    def noise_model(self) -> VoteNoise:
        return VoteNoise(self.noise, self.sigma, self.grid_bits)

    @property
    def finds_radii(self) -> bool:
        return self.knows_radii

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
        """Of the vote.

        Args:
            batch_size: noisy samples in a forward pass, at least 64, of as many examples as are pending.

        Raises:
            ValueError: a threat of another norm than the noise is for, or settings that cannot certify any input.
        """
        dimensions = x[0].numel()
        self._check(threat, dimensions)
        voter = Voter(model, x, self.noise_model, seed, batch_size, numbers)
        classes = _classes(model, voter.x, y)
        first = voter.counts(self.n0, classes, 0)
        candidate, error = first.argmax(1), first.sum(1) < self.n0
        if self.mode == "fixed":
            counts = voter.counts(self.n, classes, 1, lambda left: tell(left, (len(x) - left) * self.n))
            error |= counts.sum(1) < self.n
            hits = counts.gather(1, candidate[:, None])[:, 0].tolist()
            spent = [self.n] * len(x)
            lower = [clopper_pearson_lower(k, self.n, self.alpha) for k in hits]
        else:
            lower, spent, broken = self._sequential(voter, candidate, y, threat, tell)
            error |= torch.tensor(broken, device=error.device)
        radius = torch.tensor([self.noise_model.radius(p, dimensions) for p in lower], dtype=torch.float64)
        radius = just_below(radius.to(x.device))  # the theorem is of the open ball
        # Rounding to a grid shrinks radii, but no class: at the image itself that of more than half wins.
        abstained = torch.tensor([bound <= 0.5 for bound in lower], device=x.device)
        if not self.finds_radii:
            radius = torch.full_like(radius, threat.eps).masked_fill(radius < threat.eps, 0)
        samples = torch.tensor(spent, device=x.device) + self.n0
        yield torch.arange(len(x)), Findings(radius, candidate, error, samples=samples, abstained=abstained)

    def _check(self, threat: Threat, dimensions: int) -> None:
        """Refuse what cannot certify anything."""
        wanted = {"gaussian": "l2", "uniform": "l1"}[self.noise]
        if threat.norm != wanted:
            other = {"l1": ", noise=uniform is for l1", "l2": ", noise=gaussian is for l2"}.get(threat.norm, "")
            raise ValueError(f"{self.noise} noise certifies {wanted}, the threat is {threat}{other}")
        if self.mode == "fixed":
            best = clopper_pearson_lower(self.n, self.n, self.alpha)
            how = f"α^(1/n) = {self.alpha:g}^(1/{self.n})"
        else:
            best, how = anytime_lower(self.n, self.n, self.alpha), f"the e-process after {self.n} samples"
        reach = self.noise_model.radius(best, dimensions)
        if reach <= threat.eps:
            raise ValueError(
                f"n={self.n} samples at alpha={self.alpha:g} can never certify {threat}: were all of them for one "
                f"class, its probability would be at least {how} = {best:.6g}, the radius {reach:.4g} with "
                f"sigma={self.sigma:g}"
            )

    def _sequential(
        self, voter: Voter, candidate: Tensor, y: Tensor, threat: Threat, tell: Tell
    ) -> tuple[list[float], list[int], list[bool]]:
        """The lower bound of each probability, the samples it took, and whether some logits were NaN or inf.

        Chunks are judged in their order one by one, so that the answer does not depend on how examples are
        packed into batches.
        """
        dimensions = voter.x[0].numel()
        p_eps = self.noise_model.probability(threat.eps, dimensions)
        # Of a wrong class it is asked only whether it wins.
        wanted, candidates = [p_eps if hit else None for hit in (candidate == y).tolist()], candidate.tolist()
        hits, spent, number = [0] * len(candidates), [0] * len(candidates), [0] * len(candidates)
        lower, broken = [0.0] * len(candidates), [False] * len(candidates)
        pending = list(range(len(candidates)))
        while pending:
            chosen = pending[: voter.tasks]
            each = max(1, voter.tasks // len(chosen))
            tasks = [
                Task(i, number[i] + k, min(CHUNK, self.n - spent[i] - k * CHUNK))
                for i in chosen
                for k in range(each)
                if spent[i] + k * CHUNK < self.n
            ]
            votes = voter.votes(tasks, salt=1)
            own = torch.tensor([candidates[task.example] for task in tasks], device=votes.device)
            agreeing, valid = (votes == own[:, None]).sum(1).tolist(), (votes >= 0).sum(1).tolist()
            done = set()
            for task, agree, some in zip(tasks, agreeing, valid, strict=True):
                i = task.example
                if i in done:
                    continue
                hits[i], spent[i], number[i] = hits[i] + agree, spent[i] + task.count, number[i] + 1
                broken[i] = some < task.count
                if broken[i]:
                    done.add(i)
                elif self._decided(hits[i], spent[i], wanted[i]):
                    lower[i] = anytime_lower(hits[i], spent[i], self.alpha)
                    done.add(i)
            pending = [i for i in pending if i not in done]
            tell(len(pending), sum(spent))
        return lower, spent, broken

    def _decided(self, k: int, n: int, wanted: float | None) -> bool:
        """Whether sampling may end: it is decided if the class wins, and what is wanted of its probability.

        To give up a radius is no abstention: for that the class must not win at all.

        Args:
            wanted: what the probability must exceed for the threat's eps; None where nothing else is asked.
        """
        if n >= self.n:
            return True
        if not self._compared(k, n, 0.5):
            return False
        if wanted is None:
            return True
        if self.tolerance is None:
            return self._compared(k, n, wanted)
        noise = VoteNoise(self.noise, self.sigma)
        low = anytime_lower(k, n, self.alpha)
        high = 1 - anytime_lower(n - k, n, self.alpha)
        return bool(high <= 0.5 or noise.radius(high, 1) - noise.radius(low, 1) <= self.tolerance)

    def _compared(self, k: int, n: int, p0: float) -> bool:
        """Whether p > p0 is sure, or hopeless: giving up needs no validity, and the mirrored process bounds its
        cost."""
        threshold = -math.log(self.alpha)
        return bool(log_evidence(k, n, p0) >= threshold or log_evidence(n - k, n, 1 - p0) >= threshold)


def _classes(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """How many the network tells apart; every label must be one of them."""
    logits = predict(model, x[:1]).nan_to_num()
    check_logits(logits.expand(len(y), -1) if logits.dim() == 2 else logits, y)
    return int(logits.shape[1])


class PlugInSmoothing(_Smoothing, name="plug-in"):
    """σ / 2 (Φ⁻¹(p_y) − Φ⁻¹(p_2)) with vote shares in place of bounds (Prach & Lampert, 2024): an estimate.

    Shares are clipped to [0.01, 0.99], so it never exceeds 2.326 σ. It is there to compare with published numbers.
    """

    sigma: PositiveNumber = 0.125
    """Standard deviation of the noise, in input units."""
    n: PositiveInt = 1000
    """Noisy copies of each example that vote."""

    @property
    def promise(self) -> str:
        return "estimate"

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
        if threat.norm != "l2":
            raise ValueError(f"gaussian noise certifies l2, the threat is {threat}")
        voter, classes = Voter(model, x, self.noise_model, seed, batch_size, numbers), _classes(model, x, y)
        counts = voter.counts(self.n, classes, 1, lambda left: tell(left, (len(x) - left) * self.n))
        radius = plug_in_radius(counts, y, self.sigma).clamp(min=0)
        yield torch.arange(len(x)), Findings(radius, counts.argmax(1), counts.sum(1) < self.n)
