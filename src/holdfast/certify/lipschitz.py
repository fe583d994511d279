"""Certificates from a verified Lipschitz constant."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from holdfast.bounds.ball import Gains, certified_gains, lipschitz_radii
from holdfast.bounds.graph import trace
from holdfast.bounds.operators import Graph
from holdfast.certify.certificate import Certificate, Certifier, just_below
from holdfast.inference import check_inputs, check_logits, frozen_eval, predict
from holdfast.threat import Threat


class LipschitzCertifier(Certifier, name="lipschitz"):
    """The margin by a verified upper bound of the network's Lipschitz constant.

    With features that are L-Lipschitz in l_2 before an affine end of matrix W (a dense layer, and what else is
    affine behind the last activation) the radius is min_j (z_y − z_j) / (L ‖W_y − W_j‖₂); without such an end
    min_j (z_y − z_j) / (√2 L). L comes layer by layer
    (products, sums over branches) from upper bounds of operator norms, never from power iteration; a network with
    a layer of unknown constant is refused by its name. Radii of other norms than l_2 are what fits into the
    l_2 ball. Deterministic, up to the rounding of the logits.
    """

    @property
    def title(self) -> str:
        return "LIPSCHITZ"

    @torch.no_grad()
    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, seed: int = 0, batch_size: int = 256
    ) -> Certificate:
        y = check_inputs(x, y, threat)
        unit = threat.euclidean_eps(x[0].numel()) if len(x) else 1.0
        parts = [(y[:0], y[:0].double())]
        with frozen_eval(model):
            graph, gains = self._prepared(model, x[:batch_size], threat)
            for batch, labels in zip(x.split(batch_size), y.split(batch_size), strict=True) if len(x) else ():
                logits = predict(model, batch, batch_size)
                check_logits(logits.nan_to_num(), labels)
                within = lipschitz_radii(graph, batch, labels, gains) / unit
                parts.append((logits.argmax(1), torch.where(logits.isfinite().all(1), within, torch.nan)))
        prediction, radius = (torch.cat(column) for column in zip(*parts, strict=True))
        error = ~radius.isfinite()
        right = (prediction == y) & ~error
        covered = radius >= threat.covering_eps(x[0].numel()) if len(x) else error
        # Up to the radius, but not on it, the margin is positive.
        radius = just_below(torch.where(right, radius, 0.0)).masked_fill(right & covered, torch.inf)
        verified = right & (radius >= threat.eps)
        status = [
            "error" if bad else "verified" if holds else "undecided" if hit else "wrong"
            for bad, holds, hit in zip(error.tolist(), verified.tolist(), right.tolist(), strict=True)
        ]
        return Certificate(prediction, verified, radius, status, "deterministic")

    def _prepared(self, model: nn.Module, x: Tensor, threat: Threat) -> tuple[Graph, Gains]:
        graph = trace(model, x, box=threat.interval(x))
        return graph, certified_gains(graph, x[:1])
