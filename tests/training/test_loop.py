"""The loop: reproducible, resumable bit for bit, and it stops at the first NaN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small_cnn
from torch import Tensor, nn

from holdfast import Threat
from holdfast.data import ImageSet
from holdfast.objectives import IBP, CrossEntropy, Objective
from holdfast.objectives.objective import Loss, Progress
from holdfast.training import SGD, Adam, OneCycle, Optimizer, Training, TrainingDiverged, fit
from holdfast.training.checkpoint import Checkpoint
from holdfast.training.engine import Engine

THREAT = Threat("linf", 0.05)


@pytest.fixture
def images() -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (70,), generator=generator)
    pixels = torch.randint(0, 256, (70, 1, 8, 8), generator=generator)
    pixels[:, 0, 0, :4] = 255 * nn.functional.one_hot(labels, 4)  # something to learn
    return ImageSet(pixels.to(torch.uint8), labels, tuple("abcd"))


def run(
    images: ImageSet,
    model: nn.Module,
    epochs: int = 4,
    objective: Objective | None = None,
    optimizer: Optimizer | None = None,
    **more: Any,
) -> list[dict[str, Any]]:
    return fit(
        model,
        images,
        objective or CrossEntropy(),
        THREAT,
        optimizer or Adam(lr=0.01),
        OneCycle(),
        Training(epochs=epochs, batch_size=16),
        Engine(accelerator="cpu").start(),
        seed=5,
        **more,
    )


def weights(model: nn.Module) -> Tensor:
    return torch.cat([value.double().flatten() for value in model.state_dict().values()])


@pytest.mark.parametrize("objective", [CrossEntropy(), IBP()], ids=lambda o: o.name)
def test_the_same_seed_gives_the_same_weights_and_the_caller_keeps_its_random_state(
    images: ImageSet, objective: Objective
) -> None:
    first, second = small_cnn(), small_cnn()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    history = run(images, first, objective=objective)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    run(images, second, objective=objective)
    assert torch.equal(weights(first), weights(second))
    assert history[-1]["cross_entropy"] < history[0]["cross_entropy"]
    assert [record["epoch"] for record in history] == [1, 2, 3, 4]
    assert history[-1]["step"] == 4 * 5
    assert not any(module.training for module in first.modules())


@pytest.mark.parametrize("optimizer", [Adam(lr=0.01), SGD(lr=0.05)], ids=lambda o: o.name)
def test_a_resumed_training_ends_in_the_same_weights(
    images: ImageSet, tmp_path: Path, optimizer: Optimizer
) -> None:
    straight, resumed = small_cnn(), small_cnn(seed=9)
    path = tmp_path / "last.pt"
    kept: list[dict[str, Any]] = []

    def save(checkpoint: Checkpoint) -> None:
        if len(checkpoint.history) == 2:
            checkpoint.save(path)

    kept = run(images, straight, optimizer=optimizer, save=save)
    checkpoint = Checkpoint.load(path, torch.device("cpu"))
    history = run(images, resumed, optimizer=optimizer, resume=checkpoint)
    assert torch.equal(weights(resumed), weights(straight))
    assert [record["loss"] for record in history] == [record["loss"] for record in kept]


def test_validation_is_recorded_and_changes_nothing(images: ImageSet) -> None:
    plain, validated = small_cnn(), small_cnn()
    run(images, plain)

    def validate(model: nn.Module) -> dict[str, float]:
        torch.rand(3)
        model.eval()
        return {"validation_standard": 0.5}

    history = run(images, validated, validate=validate)
    assert all(record["validation_standard"] == 0.5 for record in history)
    assert torch.equal(weights(plain), weights(validated))


def test_a_loss_that_is_not_finite_stops_the_training(images: ImageSet) -> None:
    class Diverging(Objective):
        name = "diverging"

        def loss(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> Loss:
            total = model(x).sum() * (torch.nan if progress.step == 7 else 1.0)
            return Loss(total, {})

    saved: list[Checkpoint] = []
    with pytest.raises(TrainingDiverged, match=r"the loss is nan at epoch 2, step 3 of 5 .*training images \["):
        run(images, small_cnn(), objective=Diverging(), save=saved.append)
    assert len(saved) == 1


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"last\.pt cannot be read .*delete it"):
        Checkpoint.load(path, torch.device("cpu"))
    torch.save({"something": 1}, path)
    with pytest.raises(ValueError, match="cannot be read"):
        Checkpoint.load(path, torch.device("cpu"))


def test_checkpoints_hold_tensors_and_numbers_only(images: ImageSet, tmp_path: Path) -> None:
    saved: list[Checkpoint] = []
    run(images, small_cnn(), save=saved.append)
    saved[-1].save(tmp_path / "last.pt")
    assert list(tmp_path.iterdir()) == [tmp_path / "last.pt"]
    assert Checkpoint.load(tmp_path / "last.pt", torch.device("cpu")).history == saved[-1].history
