"""Certificates from a verified Lipschitz constant."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from holdfast.bounds.ball import lipschitz_radii
from holdfast.bounds.gains import certified_gains
from holdfast.bounds.rounding import Rounding
from holdfast.certify.certificate import Deterministic, Examples, Findings, by_class, strictly_within
from holdfast.certify.double import in_float64
from holdfast.threat import Threat


class LipschitzCertifier(Deterministic, name="lipschitz"):
    """The margin by a verified upper bound of the network's Lipschitz constant.

    With features that are L-Lipschitz in l_2 before an affine end of matrix W (a dense layer, and what else is
    affine behind the last activation) the radius is min_j (z_y − z_j) / (L ‖W_y − W_j‖₂); without such an end
    min_j (z_y − z_j) / (√2 L). L comes layer by layer
    (products, sums over branches) from upper bounds of operator norms, never from power iteration; a network with
    a layer of unknown constant is refused by its name. Radii of other norms than l_2 are what fits into the
    l_2 ball. Computed in float64, which costs one forward, and rounded down by what that may err by. Of a layer
    that is known by its constant alone (CPL, SLL, SOC, spectral and sandwich layers) the error of computing it is
    taken as 2^16 roundings of a number as long as its input.
    """

    @property
    def title(self) -> str:
        return "LIPSCHITZ"

    def prover(self, model: nn.Module, x: Tensor, threat: Threat) -> Callable[[Examples], Findings]:
        if self.arithmetic == "float32":
            raise ValueError(
                "arithmetic float32 is not stated by Lipschitz constants, which say nothing of torch's rounding "
                "away from the input; bounds by ibp or crown state it"
            )
        dimensions = x[0].numel()
        unit, covering = threat.euclidean_eps(dimensions), threat.covering_eps(dimensions)
        exact, place = in_float64(model, x)
        first = x[:1].to(place)
        graph = self.traced(exact, x.to(place), threat)
        gains, rounding = certified_gains(graph, first), Rounding.of(torch.float64, self.arithmetic)

        def prove(batch: Examples) -> Findings:
            found = lipschitz_radii(graph, batch.x.to(place), batch.y.to(place.device), gains, rounding)
            radii = rounding.below(found / unit).to(batch.x.device)
            radius = radii.amin(1)
            error = ~radius.isfinite()
            covered = ~error & (radius >= covering)
            radius = strictly_within(radius.masked_fill(error, 0)).masked_fill(covered, torch.inf)
            excluded = by_class(strictly_within(radii.nan_to_num(nan=-1.0)) >= threat.eps, batch.y)
            return Findings(radius, error=error, excluded=excluded)

        return prove
