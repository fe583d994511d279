"""Every family on a device that is not the CPU: the same answers, and nothing left behind on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device.agreement import agree
from helpers import images, small_cnn
from torch import Tensor, nn

from holdfast import Threat, evaluate
from holdfast.attacks import Attack
from holdfast.bounds import METHODS, bound_margins, bound_outputs
from holdfast.certify import Certifier
from holdfast.data.augmentation import Augmentation
from holdfast.objectives import Objective, Progress

THREATS = {"linf": "linf:0.05", "l2": "l2:0.3", "l1": "l1:1.0", "l0": "l0:3"}
SHORT = {"steps": 5, "queries": 60, "iterations": 5, "searches": 2}
VARIANTS: list[dict[str, Any]] = [
    {"name": "pgd", "steps": 5, "precision": "bf16"},
    {"name": "pgd", "steps": 5, "target": "random"},
    {"name": "pgd", "steps": 5, "target": "least-likely", "loss": "dlr"},
    {"name": "pgd", "steps": 5, "loss": "kl", "momentum": 1.0},
]


class Dense(nn.Module):
    """Its last layer reads the input beside what a convolution makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 3, 3, padding=1), nn.Linear(256, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([x, self.first(x).relu()], 1).flatten(1))


def network(kind: str, device: str) -> nn.Module:
    torch.manual_seed(0)
    made = {"cnn": lambda: small_cnn(batch_norm=False), "batch-norm": small_cnn, "dense": Dense}[kind]()
    return made.eval().to(device)


def question(device: str, count: int = 6, kind: str = "batch-norm") -> tuple[nn.Module, Tensor, Tensor]:
    """A network, images, and labels of which the first is wrong."""
    model, (x, _) = network(kind, device), images(count)
    with torch.no_grad():
        y = network(kind, "cpu")(x).argmax(1)
    y[0] = (y[0] + 1) % 4
    return model, x.to(device), y.to(device)


def shortened(name: str) -> dict[str, Any]:
    known = Attack.registry[name].model_fields
    return {"name": name} | {key: value for key, value in SHORT.items() if key in known}


@pytest.mark.parametrize("norm", THREATS)
@pytest.mark.parametrize("name", [name for name in sorted(Attack.registry) if name != "autoattack"])
def test_attacks(name: str, norm: str) -> None:
    attack, threat = Attack.parse(shortened(name)), Threat.parse(THREATS[norm])
    agree(lambda device: attack(*question(device), threat), refuses=True, atol=1e-3)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_variants_of_pgd(settings: dict[str, Any]) -> None:
    attack, threat = Attack.parse(settings), Threat.parse(THREATS["linf"])

    def distances(device: str) -> Any:
        result = attack(*question(device), threat)
        return result.success, result.distance

    agree(distances, atol=1e-3)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", sorted(Objective.registry))
def test_objectives(name: str, norm: str) -> None:
    def gradients(device: str) -> Any:
        model, x, y = question(device)
        objective = Objective.parse({"name": name})
        objective.initialise(model.train(), 0)
        model[5].eval()  # Dropout draws from the device's own generator
        losses = []
        for step in (3, 19):
            loss = objective.loss(model, x, y, Threat.parse(THREATS[norm]), Progress(step, 20))
            loss.total.backward()
            assert loss.total.device.type == x.device.type
            assert all(part.device.type == x.device.type for part in loss.parts.values())
            losses += [loss.total, *loss.parts.values()]
        return losses, [p.grad for p in model.parameters() if p.grad is not None]

    agree(gradients, refuses=True, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("norm", THREATS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["batch-norm", "dense"])
def test_bounds(kind: str, method: str, norm: str) -> None:
    def bounds(device: str) -> Any:
        model, x, y = question(device, 4, kind)
        margins = bound_margins(model, x, y, Threat.parse(THREATS[norm]), method=method)
        margins.sum().backward()
        outputs = bound_outputs(model, x, Threat.parse(THREATS[norm]), method=method, arithmetic="real")
        return margins, outputs, [p.grad for p in model.parameters() if p.grad is not None]

    agree(bounds, refuses=True, rtol=1e-3)


CERTIFIERS: list[dict[str, Any]] = [
    *[{"name": "bounds", "method": method} for method in (*METHODS, "cascade")],
    {"name": "branch-and-bound", "seconds": 60},
    {"name": "lipschitz"},
    {"name": "plug-in", "sigma": 0.25, "n": 200},
    *[
        {"name": "smoothing", "sigma": 0.25, "n": 300, "alpha": 0.05, **more}
        for more in ({}, {"mode": "fixed"}, {"noise": "uniform"}, {"grid_bits": 12}, {"tolerance": 0.05})
    ],
]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("settings", CERTIFIERS, ids=str)
def test_certifiers(settings: dict[str, Any], norm: str) -> None:
    threat = Threat.parse({"linf": "linf:0.02", "l2": "l2:0.1", "l1": "l1:0.2"}[norm])

    def verdicts(device: str) -> Any:
        certificate = Certifier.parse(settings)(*question(device, 4, "dense"), threat)
        return certificate.prediction, certificate.verified, certificate.radius

    agree(verdicts, refuses=True, rtol=2e-3, atol=2.1e-3)  # a radius is searched to a thousandth


@pytest.mark.parametrize(
    ("threat", "attacks", "certifiers"),
    [
        ("linf:0.02", ["pgd", "square"], ["bounds"]),
        ("l2:0.1", ["pgd"], [{"name": "smoothing", "sigma": 0.25, "n": 500}]),
        ("l2:0.1", ["pgd"], ["lipschitz", {"name": "bounds", "method": "bcp"}]),
    ],
)
def test_evaluations(threat: str, attacks: list[Any], certifiers: list[Any]) -> None:
    chosen = [shortened(name) for name in attacks]

    def table(device: str) -> Any:
        model, x, y = question(device, 8, "cnn")
        found = evaluate(model, x.cpu(), y.cpu(), threat, chosen, certifiers, audit=1.0)
        verdicts = found.table.select_dtypes("bool")
        assert verdicts.shape[1] > 2
        return torch.tensor(verdicts.to_numpy())

    agree(table)


@pytest.mark.parametrize("name", sorted(Augmentation.registry))
def test_augmentations(name: str) -> None:
    def augmented(device: str) -> Any:
        x, y = images(12, channels=3)
        x = torch.nn.functional.interpolate(x, (32, 32))
        settings = {"num_classes": 4} if name == "mixup" else {}
        generator = torch.Generator().manual_seed(0)
        augmentation = Augmentation.parse({"name": name, **settings})
        return augmentation(x.to(device), y.to(device), generator)

    agree(augmented)
