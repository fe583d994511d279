"""The smoothed classifier: an object that predicts with abstention, certifies, and can be attacked."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy import special
from torch import Tensor, nn

from holdfast.attacks import AttackResult
from holdfast.certify.certificate import Certificate, Certifier
from holdfast.certify.votes import CHUNK, VoteNoise, Voter
from holdfast.inference import frozen_eval, mix_seed, plain_arithmetic
from holdfast.search import climb
from holdfast.threat import Threat

FURTHER_STEPS = 20
"""Of the ascent that goes on where few votes changed."""


class SmoothedClassifier(nn.Module):
    """The vote under noise of a network: it predicts with abstention, certifies, and can be attacked.

    ``forward`` gives log vote shares over ``samples`` noise vectors that are the same for every input: its classes
    are votes, its gradient that of the mean probabilities. It is there for attacks; what they find on these few
    votes counts only where many new ones are ``surely`` for another class.
    """

    def __init__(
        self, model: nn.Module, certifier: Certifier, noise: VoteNoise, *, samples: int = 32, seed: int = 0
    ) -> None:
        super().__init__()
        self.model, self.certifier, self.samples, self.seed = model, certifier, samples, seed
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        logits = self._noisy_logits(x)
        floor = 0.1 / self.samples
        soft = (logits.softmax(2).mean(1) + floor).log()
        votes = F.one_hot(logits.argmax(2), logits.shape[2]).to(logits).mean(1)
        result: Tensor = (votes + floor).log() + soft - soft.detach()
        return result

    def _noisy_logits(self, x: Tensor) -> Tensor:
        """Of every input under every noise vector, (N, samples, K)."""
        numbers = range(-(-self.samples // CHUNK))
        noise = torch.cat([self.noise.draw(x[0], mix_seed(self.seed, number, 21)) for number in numbers])
        noisy = (self.noise.on_grid(x)[:, None] + noise[: self.samples]).flatten(0, 1)
        logits: Tensor = self.model(noisy)
        return logits.unflatten(0, (len(x), self.samples))

    @torch.no_grad()
    def votes(self, x: Tensor, *, n: int = 1000, seed: int = 0) -> Tensor:
        """How many of n noisy copies of each input the network gives each class, (N, K); NaN logits give none."""
        with frozen_eval(self.model), plain_arithmetic(x.device):
            logits = self.model(x[:2].clone())
            return Voter(self.model, x, self.noise, seed, 1024).counts(n, logits.shape[1], 31)

    def predict(self, x: Tensor, *, n: int = 1000, alpha: float = 0.001, seed: int = 0) -> Tensor:
        """The class of each input, (N,) int64; −1 where the vote leaves it open."""
        return sure(self.votes(x, n=n, seed=seed), alpha)

    def confirmed(self, result: AttackResult, x: Tensor, y: Tensor, threat: Threat) -> AttackResult:
        """What an attack found on the few votes of ``forward``, where new votes are surely not for y.

        Where they are not, the ascent goes on from there for a while: the attack stopped as soon as half of the
        few votes had changed.
        """
        x_adv, success, distance = result.x_adv.clone(), result.success.clone(), result.distance.clone()
        holds = torch.zeros_like(success)
        hits = torch.isfinite(result.adversarial_distance).nonzero().squeeze(1)
        if len(hits):
            holds[hits] = self._surely_other(x_adv[hits], y[hits])
        weak = hits[~holds[hits]]
        success[weak] = False
        if len(weak) and threat.eps > 0:
            with frozen_eval(self.model):
                start = threat.project(x[weak], x_adv[weak])
                points = climb(
                    lambda points, rows: (-self._log_probability(points, y[weak[rows]]), None),
                    x[weak],
                    threat,
                    steps=FURTHER_STEPS,
                    step_size=threat.eps / 8,
                    start=start,
                )
            surely = self._surely_other(points, y[weak])
            rows = weak[surely]
            x_adv[rows], success[rows], holds[rows] = points[surely], True, True
            distance[rows] = threat.distance(x[rows], points[surely]).to(distance)
        origin = np.where(holds.cpu().numpy(), result.origin, "")
        return replace(result, x_adv=x_adv, success=success, distance=distance, origin=origin)

    def _surely_other(self, x: Tensor, y: Tensor) -> Tensor:
        found = self.predict(x)
        return (found != y) & (found >= 0)

    def _log_probability(self, x: Tensor, y: Tensor) -> Tensor:
        """log of the mean probability of y, (N,)."""
        logs = self._noisy_logits(x).log_softmax(2)
        return logs[torch.arange(len(x), device=x.device), :, y].logsumexp(1)

    def certify(self, x: Tensor, y: Tensor, threat: Threat, *, seed: int = 0, batch_size: int = 256) -> Certificate:
        """The certificate of each input."""
        return self.certifier(self.model, x, y, threat, seed=seed, batch_size=batch_size)


def sure(votes: Tensor, alpha: float = 0.001) -> Tensor:
    """The class with most votes, (N,) int64; −1 where a two-sided binomial test leaves the first two open.

    With probability at most alpha it is not the smoothed classifier's own class (Hung & Fithian, 2019).

    Args:
        votes: (N, K).
    """
    best, order = votes.topk(2, dim=1)
    first, second = best.double().cpu().unbind(1)
    tail = torch.from_numpy(special.betainc(first.numpy(), second.numpy() + 1, 0.5)).to(order.device)
    return torch.where(2 * tail <= alpha, order[:, 0], -1)
