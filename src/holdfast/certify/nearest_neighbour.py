"""Certificates of the nearest-neighbour classifier."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from holdfast.certify.certificate import Certificate, Certifier, just_below
from holdfast.inference import check_inputs, check_logits, frozen_eval, predict
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

    @torch.no_grad()
    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, seed: int = 0, batch_size: int = 256
    ) -> Certificate:
        y = check_inputs(x, y, threat)
        if not isinstance(model, NearestNeighbour) or model.norm != threat.norm:
            given = f"one in {model.norm}" if isinstance(model, NearestNeighbour) else type(model).__name__
            raise ValueError(f"this certifies a NearestNeighbour in {threat.norm}, given {given}")
        with frozen_eval(model):
            distance = -predict(model, x, batch_size)
        check_logits(distance, y)
        own = distance.gather(1, y[:, None]).squeeze(1).double()
        other = distance.scatter(1, y[:, None], torch.inf).amin(1).double()
        prediction = distance.argmin(1)
        right = prediction == y
        margin = other - own - ROUNDING * (other + own)
        radius = just_below(torch.where(right, margin / 2, 0.0))
        verified = right & (radius >= threat.eps)
        status = [
            "verified" if holds else "undecided" if hit else "wrong"
            for holds, hit in zip(verified.tolist(), right.tolist(), strict=True)
        ]
        return Certificate(prediction, verified, radius, status, "deterministic", margin=margin)
