"""The smoothed classifier: an object that predicts with abstention, certifies, and can be attacked."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from scipy import special
from torch import Tensor, nn

from holdfast.attacks import AttackResult
from holdfast.certify.certificate import Certificate, Certifier
from holdfast.certify.votes import CHUNK, Noise, Voter
from holdfast.inference import frozen_eval, mix_seed
from holdfast.threat import Threat


class SmoothedClassifier(nn.Module):
    """The vote under noise of a network: it predicts with abstention, certifies, and can be attacked.

    ``forward`` gives log vote shares over ``samples`` noise vectors that are the same for every input: its classes
    are votes, its gradient that of the mean probabilities. What an attack finds on these few votes is
    ``confirmed`` by new ones.
    """

    def __init__(
        self, model: nn.Module, certifier: Certifier, noise: Noise, *, samples: int = 32, seed: int = 0
    ) -> None:
        super().__init__()
        self.model, self.certifier, self.samples, self.seed = model, certifier, samples, seed
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        numbers = range(-(-self.samples // CHUNK))
        noise = torch.cat([self.noise.draw(x[0], mix_seed(self.seed, number, 21)) for number in numbers])
        noisy = (x[:, None] + noise[: self.samples]).flatten(0, 1)
        logits = self.model(self.noise.on_grid(noisy)).unflatten(0, (len(x), self.samples))
        floor = 0.1 / self.samples
        soft = (logits.softmax(2).mean(1) + floor).log()
        votes = torch.nn.functional.one_hot(logits.argmax(2), logits.shape[2]).to(logits).mean(1)
        result: Tensor = (votes + floor).log() + soft - soft.detach()
        return result

    @torch.no_grad()
    def predict(self, x: Tensor, *, n: int = 1000, alpha: float = 0.001, seed: int = 0) -> Tensor:
        """The class of each input, (N,) int64; −1 where the vote leaves it open.

        The two classes with most votes are compared by a two-sided binomial test (Hung & Fithian, 2019): a
        class is given that is not the smoothed classifier's own with probability at most alpha.
        """
        with frozen_eval(self.model):
            classes = self.model(x[:2].clone()).shape[1]
            voter = Voter(self.model, x, self.noise, seed, 1024)
            votes, order = voter.counts(n, classes, 31).topk(2, dim=1)
        first, second = votes.double().cpu().unbind(1)
        tail = torch.from_numpy(special.betainc(first.numpy(), second.numpy() + 1, 0.5)).to(order.device)
        return torch.where(2 * tail <= alpha, order[:, 0], -1)

    def confirmed(self, result: AttackResult, y: Tensor) -> AttackResult:
        """What an attack found on the few votes of ``forward``, where new votes surely say another class than y."""
        open_rows = torch.isfinite(result.adversarial_distance).nonzero().squeeze(1)
        holds = torch.zeros_like(result.success)
        if len(open_rows):
            found = self.predict(result.x_adv[open_rows])
            holds[open_rows] = (found != y[open_rows]) & (found >= 0)
        origin = np.where(holds.cpu().numpy(), result.origin, "")
        return replace(result, success=result.success & holds, origin=origin)

    def certify(self, x: Tensor, y: Tensor, threat: Threat, *, seed: int = 0, batch_size: int = 256) -> Certificate:
        """The certificate of each input."""
        return self.certifier(self.model, x, y, threat, seed=seed, batch_size=batch_size)
