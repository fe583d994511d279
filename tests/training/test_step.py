"""What a training step remembers without waiting: the first loss that was not finite, sums, singular vectors."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import small_cnn
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from holdfast import Threat
from holdfast.data import ImageSet
from holdfast.objectives import BCP, CrossEntropy, Loss, Objective
from holdfast.training import SGD, Constant, Training, TrainingDiverged, fit
from holdfast.training.checkpoint import Checkpoint
from holdfast.training.engine import Engine
from holdfast.training.step import STEPS_UNASKED, Finite, Tally, TrainingStep

ELSEWHERE: Any = SimpleNamespace(device=torch.device("meta"), processes=1, gathered=lambda value: [value])
"""An engine on a device that is not asked at every step."""


@pytest.fixture
def images() -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (70, 1, 8, 8), generator=generator).to(torch.uint8)
    return ImageSet(pixels, torch.randint(0, 4, (70,), generator=generator), tuple("abcd"))


def test_the_first_loss_that_is_not_finite_is_remembered_until_somebody_asks() -> None:
    finite = Finite(ELSEWHERE)
    losses = [1.0, 2.0, torch.inf, 1.0, torch.nan]
    for step, loss in enumerate(losses, start=7):
        assert finite.note(torch.tensor(loss), step) is None
    assert finite.ask() == (9, torch.inf)
    assert finite.ask() is None
    losses = [torch.nan if step == 14 else 1.0 for step in range(12, STEPS_UNASKED)]
    asked = [finite.note(torch.tensor(loss), step) for step, loss in enumerate(losses, start=12)]
    assert asked[:-1] == [None] * (len(losses) - 1)
    assert asked[-1] is not None
    assert asked[-1][0] == 14
    assert Finite(ELSEWHERE).ask() is None


def test_sums_are_those_of_every_step_whatever_parts_it_has() -> None:
    steps = [
        ({"loss": 1.0}, 3),
        ({"loss": 2.0, "part": 5.0}, 2),
        ({"part": 1.0, "loss": 4.0}, 1),
        ({"loss": 1.5}, 4),
    ]
    whole, before = Tally({}), Tally({})
    for number, (values, count) in enumerate(steps):
        tensors = {name: torch.tensor(value) for name, value in values.items()}
        whole.add(tensors, count)
        before.add(tensors, count)
        if number == 1:  # a checkpoint in between
            before = Tally(before.over_processes(Engine(accelerator="cpu").start()))
    sums = whole.over_processes(Engine(accelerator="cpu").start())
    assert {name: value.tolist() for name, value in sums.items()} == {"loss": [17.0, 10.0], "part": [11.0, 3.0]}
    again = before.over_processes(Engine(accelerator="cpu").start())
    assert all(torch.equal(sums[name], again[name]) for name in sums)


def test_processes_that_have_seen_other_parts_add_each_to_its_own() -> None:
    """As after a resumption, where the leader begins with a checkpoint's sums and the others with none."""
    parts = {name: torch.tensor(float(number)) for number, name in enumerate(["loss", *"abcdefgh"])}
    tallies = [Tally({"gone": torch.tensor([7.0, 4.0], dtype=torch.float64)}), Tally({}), Tally({})]
    tallies[0].add(parts, 2)
    tallies[1].add(dict(reversed(parts.items())), 2)
    assert tallies[1].names == list(parts)[::-1]  # no order that differs from process to process
    given: list[Tensor] = []

    def together(value: Tensor) -> Tensor:
        given.append(value)
        return torch.stack(given).sum(0)

    names = [tally.names for tally in tallies]
    engine: Any = SimpleNamespace(device=torch.device("cpu"), gathered=lambda value: names, sum=together)
    sums = [tally.over_processes(engine) for tally in tallies][-1]
    assert {name: value.tolist() for name, value in sums.items()} == {
        "gone": [7.0, 4.0],
        **{name: [4 * value.item(), 4.0] for name, value in parts.items()},
    }


@pytest.mark.parametrize(
    "wrapped",
    [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal],
    ids=lambda wrapped: wrapped.__name__,
)
def test_the_sum_of_absolute_weights_is_over_those_that_parametrised_layers_compute_with(wrapped: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), wrapped(nn.Linear(16, 8)), nn.ReLU(), nn.Linear(8, 4)).eval()
    step = TrainingStep(model, CrossEntropy(), Threat("linf", 0.1), 0.5)
    x, y = torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 2])
    total, parts, _ = step(x, y, 0, 1)
    expected = model[1].weight.abs().sum() + model[3].weight.abs().sum()
    assert torch.isclose(parts["l1"], expected)
    assert torch.isclose(total, nn.functional.cross_entropy(model(x), y) + 0.5 * expected)
    original = next(model[1].parametrizations.parameters())
    plain = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), original, retain_graph=True)[0]
    assert not torch.allclose(torch.autograd.grad(total, original)[0], plain)


def test_weights_that_two_layers_share_count_once_and_none_are_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[3].weight = model[1].weight
    step = TrainingStep(model, CrossEntropy(), Threat("linf", 0.1), 0.5)
    _, parts, _ = step(torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 2]), 0, 1)
    assert torch.isclose(parts["l1"], model[1].weight.abs().sum())
    with pytest.raises(ValueError, match=r"training\.l1=0\.5 needs a layer with a weight"):
        TrainingStep(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4)), CrossEntropy(), Threat("linf", 0.1), 0.5)


@pytest.fixture
def breaking() -> Iterator[CrossEntropy]:
    """A loss that is infinite at one step, and from then on an error."""

    class Breaking(CrossEntropy, name="breaking"):
        def loss(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Any) -> Loss:
            loss = super().loss(model, x, y, threat, progress)
            if progress.step > 4:
                raise RuntimeError("weights that are NaN")
            return Loss(loss.total / (progress.step != 4), loss.parts)

    yield Breaking()
    del Objective.registry["breaking"]


def test_what_follows_from_a_loss_that_nobody_asked_about_is_told_as_that_loss(
    images: ImageSet, breaking: CrossEntropy, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Finite.__init__

    def unasked(self: Finite, engine: Any) -> None:
        real(self, engine)
        self._alone = False

    monkeypatch.setattr(Finite, "__init__", unasked)
    with pytest.raises(TrainingDiverged, match=r"the loss is inf at epoch 2, step 2 of 3; .* images \["):
        fit(
            small_cnn(), images, breaking, Threat("linf", 0.1), SGD(lr=0.1), Constant(),
            Training(epochs=2, batch_size=30), Engine(accelerator="cpu").start(),
        )  # fmt: skip


def test_a_resumed_training_goes_on_from_the_saved_vectors(images: ImageSet) -> None:
    kept: list[Checkpoint] = []

    def trained(resume: Checkpoint | None, save: Any) -> list[Tensor]:
        model = small_cnn()
        model[5] = nn.Identity()
        fit(
            model, images, BCP(ramp_end=1.0), Threat("l2", 0.2), SGD(lr=0.01), Constant(),
            Training(epochs=2, batch_size=20, checkpoint_every=3), Engine(accelerator="cpu").start(),
            resume=resume, save=save,
        )  # fmt: skip
        return list(model.state_dict().values())

    def copied(checkpoint: Checkpoint) -> None:
        import io

        buffer = io.BytesIO()
        torch.save(vars(checkpoint), buffer)
        buffer.seek(0)
        kept.append(Checkpoint(**torch.load(buffer, weights_only=True)))

    whole = trained(None, copied)
    assert kept[0].step == 3
    assert kept[0].carried
    assert all(torch.equal(*pair) for pair in zip(whole, trained(kept[0], None), strict=True))
    forgetful = Checkpoint(**{**vars(kept[0]), "carried": {}})
    assert not all(torch.equal(*pair) for pair in zip(whole, trained(forgetful, None), strict=True))
