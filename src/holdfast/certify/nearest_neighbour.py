"""Certificates of the nearest-neighbour classifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from holdfast.certify.certificate import Certifier, Examples, Findings, just_below
from holdfast.models.nearest_neighbour import NearestNeighbour
from holdfast.threat import Threat

ROUNDING = 1e-5
"""Share of two distances by which their difference may be wrong in float32."""


class NearestNeighbourCertifier(Certifier):
    """Half the difference of the distances to the nearest other and to the own class, of that classifier alone.

    Each distance changes by at most ‖x' − x‖, so that the prediction holds within (d_j − d_y) / 2. Around training
    examples that is half their separation, and exact where no other of the class is nearer to the point half-way.
    """

    name: ClassVar[str] = "nearest-neighbour"  # not registered: no recipe has such a classifier

    def prover(self, model: nn.Module, x: Tensor, threat: Threat) -> Callable[[Examples], Findings]:
        if not isinstance(model, NearestNeighbour) or model.norm != threat.norm:
            given = f"one in {model.norm}" if isinstance(model, NearestNeighbour) else type(model).__name__
            raise ValueError(f"this certifies a NearestNeighbour in {threat.norm}, given {given}")
        return self._proven

    def _proven(self, batch: Examples) -> Findings:
        distance, label = -batch.logits, batch.y[:, None]
        own = distance.gather(1, label).squeeze(1).double()
        other = distance.scatter(1, label, torch.inf).amin(1).double()
        margin = other - own - ROUNDING * (other + own)
        return Findings(just_below(margin / 2), margin=margin)
