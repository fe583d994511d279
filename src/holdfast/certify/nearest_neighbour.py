"""Certificates of the nearest-neighbour classifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from holdfast.bounds.rounding import STEPS, Rounding
from holdfast.certify.certificate import Deterministic, Examples, Findings, strictly_within
from holdfast.certify.double import in_float64
from holdfast.models.nearest_neighbour import NearestNeighbour
from holdfast.threat import Threat


class NearestNeighbourCertifier(Deterministic):
    """Half the difference of the distances to the nearest other and to the own class, of that classifier alone.

    Each distance changes by at most ‖x' − x‖, so that the prediction holds within (d_j − d_y) / 2. Around training
    examples that is half their separation, and exact where no other of the class is nearer to the point half-way.
    Computed in float64, less what that may err by.
    """

    name: ClassVar[str] = "nearest-neighbour"  # not registered: no recipe has such a classifier

    def prover(self, model: nn.Module, x: Tensor, threat: Threat) -> Callable[[Examples], Findings]:
        if not isinstance(model, NearestNeighbour) or model.norm != threat.norm:
            given = f"one in {model.norm}" if isinstance(model, NearestNeighbour) else type(model).__name__
            raise ValueError(f"this certifies a NearestNeighbour in {threat.norm}, given {given}")
        exact, place = in_float64(model, x)
        rounding = Rounding.of(torch.float64, self.arithmetic)
        share = 2 * rounding.gamma(x[0].numel() + STEPS)  # of the distance itself, and of which one is the least

        def prove(batch: Examples) -> Findings:
            distance, label = -exact(batch.x.to(place)), batch.y[:, None].to(place.device)
            own = distance.gather(1, label).squeeze(1)
            other = distance.scatter(1, label, torch.inf).amin(1)
            margin = rounding.below(other - own) - share * (other + own)
            return Findings(strictly_within(margin / 2).to(batch.x.device), margin=margin.to(batch.x.device))

        return prove
