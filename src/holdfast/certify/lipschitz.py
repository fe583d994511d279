"""Certificates from a verified Lipschitz constant."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from holdfast.bounds.ball import certified_gains, lipschitz_radii
from holdfast.bounds.graph import trace
from holdfast.certify.certificate import Certifier, Examples, Findings, just_below
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

    def prover(self, model: nn.Module, x: Tensor, threat: Threat) -> Callable[[Examples], Findings]:
        dimensions = x[0].numel()
        unit, covering = threat.euclidean_eps(dimensions), threat.covering_eps(dimensions)
        graph = trace(model, x, box=threat.interval(x))
        gains = certified_gains(graph, x[:1])

        def prove(batch: Examples) -> Findings:
            radius = lipschitz_radii(graph, batch.x, batch.y, gains) / unit
            error = ~radius.isfinite()
            covered = ~error & (radius >= covering)
            # Up to the radius, but not on it, the margin is positive.
            radius = just_below(radius.masked_fill(error, 0)).masked_fill(covered, torch.inf)
            return Findings(radius, error=error)

        return prove
