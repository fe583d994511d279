"""Each attack beside its peer at the same budget on three trained networks; needs HOLDFAST_DATA for the images.

The counts are those of torchattacks 3.5.1 and adv-lib 0.2.8 (``benchmarks/attack_agreement.py``).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from holdfast import Threat
from holdfast.attacks import APGD, DDN, FAB, FMN, PGD, APGDTargeted, Attack, Square
from holdfast.data import load_data
from holdfast.models import build

STORED = np.load(Path(__file__).parents[1] / "reference" / "attack_peers.npz")
NETWORKS = sorted({key.split("/")[0] for key in STORED.files})
IMAGES = 200
BUDGETS: dict[str, Attack] = {
    "pgd": PGD(steps=40, step_size=1 / 8),
    "apgd": APGD(steps=50),
    "apgd-dlr": APGD(steps=50, loss="dlr"),
    "apgd-t": APGDTargeted(steps=20),
    "fab": FAB(steps=20),
    "square": Square(queries=500),
    "fmn": FMN(steps=100),
    "ddn": DDN(steps=100),
}


SEEDS = {"pgd": 3, "apgd": 6, "apgd-dlr": 4, "square": 2}
"""Attacks that draw are compared by means: a single seed moves by two images."""


@pytest.mark.parametrize("network", NETWORKS)
def test_attacks_are_as_strong_as_their_peers(network: str) -> None:
    data, architecture, text = STORED[f"{network}/setting"]
    x, y = load_data(str(data)).test.batch(slice(IMAGES))
    model = build(str(architecture), input_shape=x.shape[1:], num_classes=10, width=2, linear_size=32).eval()
    prefix = f"{network}/weights/"
    weights = {k[len(prefix) :]: torch.from_numpy(STORED[k]).float() for k in STORED.files if k.startswith(prefix)}
    model.load_state_dict(weights)
    right, threat = model(x).argmax(1) == y, Threat.parse(str(text))
    for name, attack in BUDGETS.items():
        if f"{network}/robust/{name}" not in STORED.files:
            continue
        seeds = range(SEEDS.get(name, 1))
        results = [attack(model, x, y, threat, seed=seed) for seed in seeds]
        robust = float(np.mean([int((~result.success).sum()) for result in results]))
        peer, result = float(STORED[f"{network}/robust/{name}"]), results[0]
        assert robust <= peer + 0.005 * IMAGES, (name, robust, peer)
        if f"{network}/median/{name}" in STORED.files:
            median, theirs = result.distance[right].median().item(), float(STORED[f"{network}/median/{name}"])
            assert median <= 1.01 * theirs, (name, median, theirs)
