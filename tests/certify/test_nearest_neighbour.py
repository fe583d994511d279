"""The nearest-neighbour classifier and its certificates, by hand and against every attack."""

from __future__ import annotations

import pytest
import torch
from helpers import images, small_cnn

from holdfast import Threat, evaluate
from holdfast.analysis import local_lipschitz, separation
from holdfast.certify import NearestNeighbourCertifier
from holdfast.experiments.analyses.nearest_neighbour import TowardsNeighbour
from holdfast.models import NearestNeighbour

NORMS = ("linf", "l2", "l1")


@pytest.mark.parametrize("norm", NORMS)
def test_logits_are_distances_and_1_lipschitz(norm: str) -> None:
    x, y = images(60)
    model = NearestNeighbour(x, y, norm)
    queries = images(20, seed=5)[0].double().float()
    order = {"linf": float("inf"), "l2": 2.0, "l1": 1.0}[norm]
    for label in range(4):
        pairs = torch.linalg.vector_norm((queries[:, None] - x[y == label][None]).flatten(2), order, dim=2)
        assert torch.allclose(-model(queries)[:, label], pairs.amin(1), rtol=1e-5)
    threat = Threat(norm, {"linf": 0.1, "l2": 0.5, "l1": 2.0}[norm])
    found = local_lipschitz(model, queries, threat, steps=10)
    assert (found.value <= 4 * (1 + 1e-4)).all()  # the 1-norm of four logits of constant 1
    assert found.value.max() > 2


@pytest.mark.parametrize("norm", NORMS)
def test_training_examples_are_certified_up_to_half_their_separation(norm: str) -> None:
    x, y = images(60)
    apart = separation(x.double(), y, norm).distance
    model, threat = NearestNeighbour(x, y, norm), Threat(norm, 0.999 * float(apart.min()) / 2)
    certificate = NearestNeighbourCertifier()(model, x, y, threat)
    assert certificate.verified.all()
    assert torch.allclose(certificate.radius, apart / 2, rtol=1e-4)
    assert (certificate.radius < apart / 2).all()
    alone = NearestNeighbour(x[[0, 1]], torch.tensor([0, 1]), norm)
    exact = NearestNeighbourCertifier()(alone, x[:2], torch.tensor([0, 1]), threat)
    attack = TowardsNeighbour(rivals=1, bisections=40).attacking(alone)
    result = attack(alone, x[:2], torch.tensor([0, 1]), threat)
    assert torch.allclose(result.distance.double(), exact.radius, rtol=1e-3)


@pytest.mark.parametrize("norm", NORMS)
def test_no_attack_comes_nearer_than_the_certificate(norm: str) -> None:
    x, y = images(80)
    model = NearestNeighbour(x[:60], y[:60], norm)
    labels = model(x).argmax(1)
    labels[60:64] = (labels[60:64] + 1) % 4  # some are wrong
    threat = Threat(norm, {"linf": 0.1, "l2": 0.5, "l1": 2.0}[norm])
    attacks = [
        TowardsNeighbour().attacking(model),
        {"name": "pgd", "loss": "margin", "steps": 10},
        {"name": "fmn", "steps": 20},
    ]
    evaluation = evaluate(model, x, labels, threat, attacks, [NearestNeighbourCertifier()], attack_certified=True)
    table = evaluation.table
    assert (table.loc[60:63, "nearest-neighbour.status"] == "wrong").all()
    right = table[table["correct"]]
    # Nearer by a rounding is where float32 errs, not the classifier of real numbers.
    nearer = right["towards-neighbour.distance"] < right["nearest-neighbour.radius"]
    assert nearer.sum() <= evaluation.summary["float32_disagrees"]
    assert (right["towards-neighbour.distance"] >= (1 - 1e-6) * right["nearest-neighbour.radius"]).all()
    assert right["towards-neighbour.distance"].median() < 4 * right["nearest-neighbour.radius"].median()


def test_other_classifiers_norms_and_labels_are_refused() -> None:
    x, y = images(12)
    threat = Threat("linf", 0.1)
    with pytest.raises(ValueError, match="given Sequential"):
        NearestNeighbourCertifier()(small_cnn(), x, y, threat)
    with pytest.raises(ValueError, match="one in l2"):
        NearestNeighbourCertifier()(NearestNeighbour(x, y, "l2"), x, y, threat)
    with pytest.raises(ValueError, match="norm"):
        NearestNeighbour(x, y, "l3")
    with pytest.raises(ValueError, match="every class"):
        NearestNeighbour(x, 2 * y, "l2")
