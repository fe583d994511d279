"""Training on the device: averages, checkpoints that cross devices, and the model moved before or by `fit`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from device.agreement import agree
from helpers import small_cnn
from torch import Tensor, nn

from holdfast import Threat
from holdfast.data import ImageSet
from holdfast.objectives import Objective
from holdfast.training import Constant, Optimizer, Training, fit
from holdfast.training.checkpoint import Checkpoint


class OneDevice:
    """The engine, as far as one process needs it: lightning-fabric knows no device of tests."""

    processes, leads, compiles = 1, True, False

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def share(self, count: int) -> range:
        return range(count)

    def prepare(self, step: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        return step.to(self.device), optimizer

    def seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    @contextlib.contextmanager
    def accumulating(self, step: nn.Module) -> Iterator[None]:
        yield

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        pass

    def clip(self, step: nn.Module, optimizer: torch.optim.Optimizer, norm: float) -> None:
        torch.nn.utils.clip_grad_norm_(step.parameters(), norm)

    def sum(self, value: Tensor) -> Tensor:
        return value

    def all(self, flag: Tensor) -> bool:
        return bool(flag)

    def of_first(self, value: Any) -> Any:
        return value

    def gathered(self, value: Any) -> list[Any]:
        return [value]

    def wait(self) -> None:
        pass


def images(count: int = 90) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (count,), generator=generator)
    pixels = torch.randint(0, 256, (count, 1, 8, 8), generator=generator)
    return ImageSet(pixels.to(torch.uint8), labels, tuple("abcd"))


def trained(
    device: str, loss: Any, threat: str = "linf:0.05", *, moved: bool = False, optimizer: str = "adam", **more: Any
) -> Any:
    """Weights and losses of a short training."""
    model = small_cnn()
    model[5] = nn.Identity()  # Dropout draws from the device's own generator
    if moved:
        model.to(device)
    others = {key: more.pop(key) for key in ("resume", "save") if key in more}
    training = Training.model_validate({"epochs": 2, "batch_size": 30, **more})
    history = fit(
        model,
        images(),
        Objective.parse(loss),
        Threat.parse(threat),
        Optimizer.parse(optimizer),
        Constant(),
        training,
        OneDevice(device),
        **others,
    )
    assert all(parameter.device.type == device for parameter in model.parameters())
    return [p.detach() for p in model.state_dict().values()], [record["loss"] for record in history]


LOSSES = ["cross-entropy", "adversarial", "ibp", "bcp", "lmt", "free-at", "trades", "gaussian-noise", "smooth-adv"]
L2 = ("bcp", "lmt", "smooth-adv")


@pytest.mark.parametrize("moved", [True, False], ids=["moved", "moved by fit"])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss: str, moved: bool) -> None:
    threat = "l2:0.2" if loss in L2 else "linf:0.05"
    agree(lambda device: trained(device, loss, threat, moved=moved), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"averaging": {"kind": "ema"}},
        {"averaging": {"kind": "swa"}},
        {"clip_gradient": 1.0, "accumulate": 2},
        {"label_smoothing": 0.1, "augmentations": ["flip", {"name": "crop", "padding": 1}, "gaussian-noise"]},
        {"augmentations": [{"name": "erase", "size": 2}, {"name": "mixup", "num_classes": 4}]},
    ],
    ids=str,
)
def test_settings(settings: dict[str, Any]) -> None:
    agree(lambda device: trained(device, "cross-entropy", **settings), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("optimizer", sorted(Optimizer.registry))
def test_optimizers(optimizer: str) -> None:
    agree(lambda device: trained(device, "cross-entropy", optimizer=optimizer), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("first", "second"), [("cpu", "host"), ("host", "cpu"), ("host", "host")])
@pytest.mark.parametrize("loss", ["cross-entropy", "bcp"])
def test_a_checkpoint_goes_on_elsewhere(loss: str, first: str, second: str, tmp_path: Path) -> None:
    threat, settings = "l2:0.2", {"averaging": {"kind": "ema"}, "checkpoint_every": 2, "optimizer": "sgd"}
    kept: list[Path] = []

    def save(checkpoint: Checkpoint) -> None:
        kept.append(tmp_path / f"{checkpoint.step}.pt")
        checkpoint.save(kept[-1])

    whole = trained(first, loss, threat, save=save, **settings)
    resumed = trained(second, loss, threat, resume=Checkpoint.load(kept[0], torch.device(second)), **settings)
    for one, other in zip(whole[0], resumed[0], strict=True):
        assert torch.allclose(one.cpu(), other.cpu(), rtol=1e-3, atol=1e-4)
