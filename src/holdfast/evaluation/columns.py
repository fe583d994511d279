"""The columns of the per-example table: what a certificate and what an attack has to say of each example."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from holdfast.attacks import AttackResult
from holdfast.certify import Certificate
from holdfast.evaluation.alarm import exact_distance
from holdfast.inference import frozen_eval, plain_arithmetic, predict
from holdfast.threat import Threat


def certificate_columns(name: str, certificate: Certificate, correct: Tensor, eps: float) -> dict[str, Any]:
    """Those of a certificate. Verified and a radius of at least eps are one and the same."""
    radius = numpy(certificate.radius).astype(float)
    # At eps = 0 there is nothing to prove.
    verified = numpy(certificate.verified) if eps > 0 else numpy(correct)
    if certificate.guarantee != "deterministic":  # those ring instead
        verified = verified & numpy(correct)
    radius = np.where(verified, np.maximum(radius, eps), np.minimum(radius, np.nextafter(eps, -1)))
    columns: dict[str, Any] = {f"{name}.verified": verified, f"{name}.radius": np.maximum(radius, 0)}
    columns[f"{name}.status"] = certificate.status
    for what in ("unproven", "above", "margin", "samples", "abstained"):
        if (value := getattr(certificate, what)) is not None:
            columns[f"{name}.{what}"] = numpy(value)
    if certificate.method is not None:
        columns[f"{name}.method"] = certificate.method
    return columns


def reached_columns(
    name: str, rows: Tensor, result: AttackResult, x: Tensor, correct: Tensor, threat: Threat
) -> dict[str, Any]:
    """How near an attack came on some of the examples: success, distance and origin."""
    hits = torch.isfinite(result.adversarial_distance).to(rows.device)
    x_adv = result.x_adv.to(x.device)[hits]
    distance = torch.where(correct, torch.inf, 0.0).double().cpu()
    distance[rows[hits].cpu()] = exact_distance(threat, x[rows[hits]], x_adv)
    origin = np.full(len(correct), "", dtype=object)
    origin[numpy(rows)] = result.origin
    return {
        f"{name}.success": scatter(rows, result.success, ~correct),
        f"{name}.distance": numpy(distance),
        f"{name}.origin": origin,
    }


def attack_columns(
    name: str, rows: Tensor, result: AttackResult, x: Tensor, correct: Tensor, threat: Threat
) -> dict[str, Any]:
    """Those of an attack on some of the examples."""
    none = torch.zeros_like(correct)
    reached = reached_columns(name, rows, result, x, correct, threat)
    columns = {f"{name}.attacked": scatter(rows, torch.ones_like(rows).bool(), none)}
    columns |= {
        f"{name}.success": reached.pop(f"{name}.success"),
        f"{name}.distance": reached.pop(f"{name}.distance"),
    }
    columns |= {f"{name}.forwards": scatter(rows, result.forwards, none.long())}
    columns |= {f"{name}.backwards": scatter(rows, result.backwards, none.long()), **reached}
    if result.odd is not None and result.odd.any():
        columns[f"{name}.odd"] = scatter(rows, result.odd, none)
    return columns


def refutations(
    name: str, certificate: Certificate, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, batch_size: int
) -> tuple[Tensor, AttackResult]:
    """The counterexamples of a certificate as an attack's result, and the numbers of their examples, (M,).

    A success is what any attack's is: in the threat set, and wrong as the model computes it.
    """
    assert certificate.counterexample is not None
    refuted = torch.tensor([word == "refuted" for word in certificate.status])
    rows = refuted.nonzero().squeeze(1).to(x.device)
    x_adv = certificate.counterexample.to(x)[rows]
    wrong = torch.zeros_like(rows, dtype=torch.bool)
    if len(rows):
        with frozen_eval(model), plain_arithmetic(x.device):
            wrong = predict(model, x_adv, batch_size).argmax(1) != y[rows]
    distance = exact_distance(threat, x[rows], x_adv).to(x.device)
    within = ((x_adv >= threat.low) & (x_adv <= threat.high)).flatten(1).all(1)
    success = wrong & within & (distance <= threat.eps)
    origin = np.array([f"{name} counterexample" if one else "" for one in success.tolist()], dtype=object)
    return rows, AttackResult(x_adv, success, distance, wrong.long(), 0 * wrong.long(), origin)


def nothing(x: Tensor) -> AttackResult:
    """Of no example."""
    none = torch.zeros(0, dtype=torch.int64, device=x.device)
    return AttackResult(x[:0], none.bool(), x.new_zeros(0), none, none, np.empty(0, dtype=object))


def scatter(rows: Tensor, values: Tensor, default: Tensor) -> Any:
    """The values in their rows, the default elsewhere."""
    return numpy(default.index_put((rows,), values.to(default.device)))


def numpy(tensor: Tensor) -> Any:
    """A copy, on the CPU."""
    return tensor.cpu().numpy().copy()
