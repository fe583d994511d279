"""Each attack beside its peer at the same budget on three trained networks; needs HOLDFAST_DATA for the images.

The counts and distances are those of torchattacks 3.5.1 and adv-lib 0.2.8 (``benchmarks/attack_agreement.py``).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from holdfast import Threat
from holdfast.attacks import APGD, DDN, FAB, FMN, PGD, APGDTargeted, Attack, SigmaZero, Square
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
}
NEAREST: dict[str, Attack] = {
    **{f"fmn-{norm}": FMN(steps=100) for norm in ("linf", "l2", "l1", "l0")},
    "ddn-l2": DDN(steps=100),
    "sigma-zero-l0": SigmaZero(steps=100),
}

SEEDS = {"pgd": 3, "apgd": 6, "apgd-dlr": 4, "square": 2}
"""Attacks that draw are compared by means: a single seed moves by two images."""


Setting = tuple[str, nn.Module, Tensor, Tensor, Threat]


@pytest.fixture(params=NETWORKS)
def setting(request: pytest.FixtureRequest) -> Setting:
    """Name, network, images, labels, threat."""
    network = request.param
    data, architecture, text = STORED[f"{network}/setting"]
    x, y = load_data(str(data)).test.batch(slice(IMAGES))
    model = build(str(architecture), input_shape=x.shape[1:], num_classes=10, width=2, linear_size=32).eval()
    prefix = f"{network}/weights/"
    weights = {k[len(prefix) :]: torch.from_numpy(STORED[k]).float() for k in STORED.files if k.startswith(prefix)}
    model.load_state_dict(weights)
    return network, model, x, y, Threat.parse(str(text))


def test_attacks_are_as_strong_as_their_peers(setting: Setting) -> None:
    network, model, x, y, threat = setting
    for name, attack in BUDGETS.items():
        results = [attack(model, x, y, threat, seed=seed) for seed in range(SEEDS.get(name, 1))]
        robust = float(np.mean([int((~result.success).sum()) for result in results]))
        peer = float(STORED[f"{network}/robust/{name}"])
        assert robust <= peer + 0.005 * IMAGES, (name, robust, peer)


@pytest.mark.parametrize("name", NEAREST)
def test_attacks_come_as_near_as_their_peers(setting: Setting, name: str) -> None:
    network, model, x, y, threat = setting
    norm = name.rpartition("-")[2]
    result = NEAREST[name](model, x, y, threat if norm == threat.norm else Threat(norm, 1.0))
    median = result.distance[model(x).argmax(1) == y].median().item()
    theirs = float(STORED[f"{network}/median/{name}"])
    assert median <= 1.01 * theirs, (median, theirs)
    if norm == threat.norm:
        robust = int((~result.success).sum())
        assert robust <= float(STORED[f"{network}/robust/{name}"]) + 0.005 * IMAGES
