"""The loop: reproducible, resumable bit for bit, and it stops at the first NaN."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import IN_PLACE, small_cnn, twins
from torch import Tensor, nn

from holdfast import Threat
from holdfast.data import ImageSet
from holdfast.objectives import (
    AWP,
    CURE,
    IBP,
    LLR,
    MACER,
    MART,
    MMA,
    MTLIBP,
    RST,
    TRADES,
    TULIP,
    AdversarialTraining,
    CrossEntropy,
    FastAT,
    FreeAT,
    GaussianNoise,
    InputGradient,
    Objective,
    SmoothAdv,
)
from holdfast.objectives.objective import Loss, Progress
from holdfast.training import (
    SGD,
    Adam,
    Constant,
    Observer,
    OneCycle,
    Optimizer,
    RAdam,
    Reporter,
    Schedule,
    Training,
    TrainingDiverged,
    fit,
    loop,
)
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
    training: dict[str, Any] | None = None,
    schedule: Schedule | None = None,
    **more: Any,
) -> list[dict[str, Any]]:
    return fit(
        model,
        images,
        objective or CrossEntropy(),
        THREAT,
        optimizer or Adam(lr=0.01),
        schedule or OneCycle(),
        Training(**{"epochs": epochs, "batch_size": 16, **(training or {})}),
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


EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "augmented": {"augmentations": ["flip", {"name": "crop", "padding": 1}, {"name": "mixup", "num_classes": 4}]},
    "ema": {"averaging": {"kind": "ema", "decay": 0.9}},
    "l1": {"l1": 1e-3, "reestimate_batch_norm": True},
    "swa": {"averaging": {"kind": "swa", "start": 0.3}, "accumulate": 2, "clip_gradient": 0.1},
}


@pytest.mark.parametrize("training", EXTRAS.values(), ids=EXTRAS.keys())
@pytest.mark.parametrize("optimizer", [Adam(lr=0.01), SGD(lr=0.05), RAdam(lookahead=3)], ids=lambda o: o.name)
def test_a_resumed_training_ends_in_the_same_weights(
    images: ImageSet, tmp_path: Path, optimizer: Optimizer, training: dict[str, Any]
) -> None:
    straight, resumed = small_cnn(), small_cnn(seed=9)
    path = tmp_path / "last.pt"
    kept: list[dict[str, Any]] = []

    def save(checkpoint: Checkpoint) -> None:
        if len(checkpoint.history) == 2:
            checkpoint.save(path)

    def validate(model: nn.Module) -> dict[str, float]:
        return {"validation_weight": weights(model).sum().item()}

    kept = run(images, straight, optimizer=optimizer, training=training, save=save, validate=validate)
    checkpoint = Checkpoint.load(path, torch.device("cpu"))
    history = run(images, resumed, optimizer=optimizer, training=training, resume=checkpoint)
    assert torch.equal(weights(resumed), weights(straight))
    if "averaging" in training:  # what is validated is what is kept
        assert kept[-1]["validation_weight"] == weights(straight).sum().item()
    assert [record["loss"] for record in history] == [record["loss"] for record in kept]


class Changing(Schedule):
    """Another rate at every step."""

    def shape(self, step: float, total_steps: float) -> float:
        return 1 / (1 + step)


class Double(nn.Module):
    """A network in double precision, without anything that looks across a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.network = small_cnn(batch_norm=False).double()
        self.network[5].p = 0.0

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x.double())
        return logits


ALIKE = [
    *(CrossEntropy(), AdversarialTraining(steps=2), TRADES(steps=2, reduction="unbalanced"), FastAT()),
    *(GaussianNoise(), SmoothAdv(steps=1, ramp_end=1.0), MACER(copies=2), LLR(ramp_end=1.0)),
]


@pytest.mark.parametrize("objective", ALIKE, ids=lambda o: o.name)
def test_accumulated_batches_make_the_steps_of_their_union(images: ImageSet, objective: Objective) -> None:
    """Rates, ramps and draws included."""
    whole, halves = Double(), Double()
    batch = ImageSet(images.images[:60], images.labels[:60], images.classes)  # the last batches are short
    more: dict[str, Any] = {"objective": objective, "optimizer": SGD(lr=0.1), "schedule": Changing()}
    averaging = {"averaging": {"kind": "ema", "decay": 0.5, "start": 0.2}}
    one = run(batch, whole, epochs=2, training={"batch_size": 32, **averaging}, **more)
    many = run(batch, halves, epochs=2, training={"batch_size": 8, "accumulate": 4, **averaging}, **more)
    assert torch.allclose(weights(whole), weights(halves), atol=1e-9)
    assert [record["lr"] for record in one] == [record["lr"] for record in many]
    assert [record["loss"] for record in one] == pytest.approx([record["loss"] for record in many], rel=1e-5)


def test_a_ramp_of_the_radius_stands_still_within_a_step(images: ImageSet) -> None:
    whole, halves = small_cnn(batch_norm=False), small_cnn(batch_norm=False)
    for model in (whole, halves):
        model[5].p = 0.0
    more: dict[str, Any] = {"objective": IBP(ramp_end=1.0), "optimizer": SGD(lr=0.1), "schedule": Changing()}
    run(images, whole, epochs=2, training={"batch_size": 32}, **more)
    run(images, halves, epochs=2, training={"batch_size": 8, "accumulate": 4}, **more)
    assert torch.allclose(weights(whole), weights(halves), atol=1e-5)


def test_a_clipped_gradient_bounds_the_step(images: ImageSet) -> None:
    model = small_cnn(batch_norm=False)
    before = weights(model)
    training = {"batch_size": 70, "clip_gradient": 0.01}
    run(images, model, epochs=1, optimizer=SGD(lr=1.0, momentum=0.0), training=training, schedule=Constant())
    assert (weights(model) - before).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_smoothed_labels_keep_the_logits_in_bounds(images: ImageSet) -> None:
    x, y = Training(label_smoothing=0.2).prepare(*images.batch(slice(5)), 4, seed=0)
    assert torch.allclose(y.amax(1), torch.full((5,), 0.85))
    assert torch.allclose(y.sum(1), torch.ones(5))
    assert torch.equal(y.argmax(1), images.labels[:5])
    assert torch.equal(x, images.batch(slice(5))[0])
    plain, smoothed = small_cnn(), small_cnn()
    run(images, plain, epochs=20)
    run(images, smoothed, epochs=20, training={"label_smoothing": 0.3})
    assert smoothed(x).abs().max() < plain(x).abs().max()


def test_the_best_validation_is_kept_and_patience_ends_the_training(images: ImageSet, tmp_path: Path) -> None:
    seen: list[Tensor] = []

    def validate(model: nn.Module) -> dict[str, float]:
        seen.append(weights(model))
        return {"validation_attacked": [0.1, 0.5, 0.3, 0.5, 0.2, 0.9][len(seen) - 1]}

    model = small_cnn()
    training = {"watch": "attacked", "patience": 3}

    def save(checkpoint: Checkpoint) -> None:
        if len(checkpoint.history) == 3:
            checkpoint.save(tmp_path / "last.pt")

    history = run(images, model, epochs=6, training=training, validate=validate, save=save)
    assert len(history) == 5  # 0.3, 0.5 and 0.2 are not better than the first 0.5
    assert torch.equal(weights(model), seen[1])

    resumed = small_cnn(seed=9)
    checkpoint = Checkpoint.load(tmp_path / "last.pt", torch.device("cpu"))
    seen[:] = seen[:3]
    history = run(images, resumed, epochs=6, training=training, validate=validate, resume=checkpoint)
    assert len(history) == 5
    assert torch.equal(weights(resumed), weights(model))


def test_what_is_watched_must_be_computed(images: ImageSet) -> None:
    with pytest.raises(ValueError, match=r"training\.watch=certified, but the validation does not compute it"):
        run(images, small_cnn(), training={"watch": "certified"}, validate=lambda model: {})
    with pytest.raises(ValueError, match="patience needs watch"):
        Training(patience=2)


def test_presentations_are_the_same_work_for_every_size() -> None:
    training = Training(presentations=10_000, batch_size=16)
    totals = [training.plan(n).total for n in (16, 160, 3330, 50_000)]
    assert totals == [625, 625, 628, 625]  # 3330 leave a small batch in every epoch
    assert Training(epochs=7, batch_size=4).plan(10).total == 21
    with pytest.raises(ValueError, match="steps and presentations are two budgets"):
        Training(steps=3, presentations=2)


def test_a_budget_in_steps_may_end_within_an_epoch(images: ImageSet) -> None:
    class Count(Reporter):
        steps = 0

        def step(self, loss: Tensor) -> None:
            self.steps += 1

    counter, factors = Count(), []

    class Watched(Constant):
        def factor(self, step: int, total: int) -> float:
            factors.append((step, total))
            return super().factor(step, total)

    training = {"steps": 7, "accumulate": 3, "batch_size": 16}
    history = run(images, small_cnn(), training=training, reporter=counter, schedule=Watched())
    assert counter.steps == 7
    assert [record["step"] for record in history] == [5, 7]
    assert {total for _, total in factors} == {3}  # 3 + 2 batches, and the last two make a step
    plan = Training(**training).plan(70)
    assert plan.group(6) == (False, True, 32, 2, 16)
    assert [plan.group(number).step for number in range(7)] == [0, 0, 0, 1, 1, 2, 2]
    assert plan.steps == 3


def test_time_ends_a_training_and_stays_over(images: ImageSet) -> None:
    saved: list[Checkpoint] = []
    model, again = small_cnn(), small_cnn()
    history = run(images, model, epochs=10_000, training={"minutes": 0.01}, save=saved.append)
    assert history[-1]["out_of_time"]
    assert sum(record["train_seconds"] for record in history) >= 0.6
    assert history[-1]["step"] < 1_000_000
    assert run(images, again, epochs=10_000, training={"minutes": 0.01}, resume=saved[-1]) == history
    assert torch.equal(weights(model), weights(again))


@pytest.mark.parametrize("training", EXTRAS.values(), ids=EXTRAS.keys())
def test_a_training_resumed_within_an_epoch_ends_in_the_same_weights(
    images: ImageSet, tmp_path: Path, training: dict[str, Any]
) -> None:
    saved: list[Checkpoint] = []

    def save(checkpoint: Checkpoint) -> None:
        checkpoint.save(tmp_path / f"{checkpoint.step}.pt")
        saved.append(checkpoint)

    straight = small_cnn()
    kept = run(images, straight, training={**training, "checkpoint_every": 1}, save=save)
    within = [checkpoint.step for checkpoint in saved if checkpoint.partial]
    assert set(within) >= {2, 4, 7}
    for step in within:
        resumed = small_cnn(seed=9)
        checkpoint = Checkpoint.load(tmp_path / f"{step}.pt", torch.device("cpu"))
        history = run(images, resumed, training=training, resume=checkpoint)
        assert torch.equal(weights(resumed), weights(straight))
        assert [record["loss"] for record in history] == [record["loss"] for record in kept]


def test_a_budget_that_ends_within_an_epoch_is_resumed_with_its_last_validation(
    images: ImageSet, tmp_path: Path
) -> None:
    training = {"steps": 7, "checkpoint_every": 1, "watch": "standard"}
    values = iter([0.9, 0.1, 0.9, 0.1])

    def validate(model: nn.Module) -> dict[str, float]:
        return {"validation_standard": next(values)}

    saved: list[Checkpoint] = []

    def save(checkpoint: Checkpoint) -> None:
        checkpoint.save(tmp_path / f"{len(saved)}.pt")
        saved.append(checkpoint)

    straight, resumed = small_cnn(), small_cnn(seed=9)
    history = run(images, straight, training=training, validate=validate, save=save)
    assert [checkpoint.step for checkpoint in saved] == [1, 2, 3, 4, 5, 6, 7]
    assert [bool(checkpoint.partial) for checkpoint in saved] == [True] * 4 + [False, True, False]
    values = iter([0.1])
    last = Checkpoint.load(tmp_path / "5.pt", torch.device("cpu"))
    again = run(images, resumed, training=training, validate=validate, resume=last)
    assert [record["loss"] for record in again] == [record["loss"] for record in history]
    assert torch.equal(weights(straight), weights(resumed))


@pytest.mark.parametrize("objective", [AdversarialTraining(steps=2), IBP()], ids=lambda o: o.name)
def test_a_compiled_model_trains_to_the_same_weights(images: ImageSet, objective: Objective) -> None:
    plain, compiled = (small_cnn() for _ in range(2))
    for model in (plain, compiled):
        model[5].p = 0.0  # a compiled Dropout draws its own numbers
    settings = objective, THREAT, SGD(lr=0.01), Constant(), Training(steps=6, batch_size=16)
    fit(plain, images, *settings, Engine(accelerator="cpu").start())
    torch._dynamo.reset()  # what a test before compiled of the same code is no new graph
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    fit(compiled, images, *settings, Engine(accelerator="cpu", compile=True).start())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before or objective.name == "ibp"
    assert torch.allclose(weights(plain), weights(compiled), atol=1e-4)
    assert type(compiled) is type(plain)


def test_observers_see_every_batch_with_what_it_was_perturbed_to(images: ImageSet) -> None:
    class Watcher(Observer):
        def __init__(self) -> None:
            self.seen: list[tuple[Tensor, Tensor, Tensor | None, Progress]] = []

        def observe(self, x: Tensor, y: Tensor, x_adv: Tensor | None, progress: Progress) -> None:
            self.seen.append((x, y, x_adv, progress))

        def record(self) -> dict[str, float]:
            return {"batches_seen": float(len(self.seen))}

    plain, watched, watcher = small_cnn(), small_cnn(), Watcher()
    objective = AdversarialTraining(steps=2)
    run(images, plain, epochs=2, objective=objective)
    run(images, watched, epochs=2, objective=objective, observers=[watcher])
    assert torch.equal(weights(plain), weights(watched))
    assert [progress.step for *_, progress in watcher.seen] == list(range(10))
    labels = torch.cat([y for _, y, _, _ in watcher.seen[:5]])
    assert torch.equal(labels.bincount(), images.labels.bincount())
    for x, _, x_adv, _ in watcher.seen:
        assert x_adv is not None
        assert 0 < THREAT.distance(x, x_adv).max() <= THREAT.eps + 1e-6


def test_mixed_precision_trains_and_leaves_the_weights_in_float32(images: ImageSet) -> None:
    model = small_cnn()
    engine = Engine(accelerator="cpu", precision="bf16-mixed").start()
    history = fit(
        model, images, IBP(), THREAT, Adam(lr=0.01), OneCycle(), Training(epochs=4, batch_size=16), engine, seed=5
    )
    assert history[-1]["cross_entropy"] < history[0]["cross_entropy"]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


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


def inputs_of(images: ImageSet, objective: Objective, augmentations: list[Any]) -> tuple[nn.Module, list[Tensor]]:
    """A model averaged over no more than its last step, and what it reads in train mode then."""
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                seen.append(x.detach())
            return x

    model = nn.Sequential(Spy(), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 4))
    training = {"averaging": {"decay": 0.0}, "augmentations": augmentations}
    run(images, model, epochs=1, objective=objective, training=training, optimizer=SGD(lr=0.01))
    return model, seen


@pytest.mark.parametrize("augmentations", [[], [{"name": "mixup", "num_classes": 4}]], ids=["plain", "mixup"])
@pytest.mark.parametrize(
    "objective",
    [CrossEntropy(), GaussianNoise(sigma=0.5), AdversarialTraining(steps=2), TRADES(steps=2), FreeAT(replays=2)],
    ids=lambda o: o.name,
)
def test_averaged_weights_get_the_statistics_of_what_is_trained_on(
    images: ImageSet, objective: Objective, augmentations: list[Any]
) -> None:
    model, seen = inputs_of(images, objective, augmentations)
    trained, estimated = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert [len(x) for x in trained] == [len(x) for x in estimated]  # an epoch of each
    variance = torch.stack([x.var() for x in estimated]).mean()
    assert model[1].running_var.item() == pytest.approx(variance.item(), rel=1e-4)
    assert model[1].running_mean.item() == pytest.approx(torch.stack([x.mean() for x in estimated]).mean().item())
    alike = torch.stack([x.var() for x in trained]).mean()
    assert model[1].running_var.item() == pytest.approx(alike.item(), rel=0.1)


def test_certified_training_shares_the_statistics_of_the_clean_batch(images: ImageSet) -> None:
    model, _ = inputs_of(images, MTLIBP(steps=1), [])
    parts = images.batch(images.order(0, 5))[0].split(16)
    expected = torch.stack([x.var() for x in parts]).mean()
    assert model[1].running_var.item() == pytest.approx(expected.item(), rel=1e-4)


def test_batch_norm_is_estimated_anew_after_every_epoch(images: ImageSet) -> None:
    """On the clean images of a whole epoch, and training goes on from there."""
    model, means = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 4)), []

    def validate(model: nn.Module) -> dict[str, float]:
        means.append(model[0].running_mean.item())
        return {}

    training = {"reestimate_batch_norm": True}
    run(images, model, 2, MTLIBP(steps=1), SGD(lr=0.01), training, validate=validate)
    parts = images.batch(images.order(0, 5))[0].split(16)
    assert means == pytest.approx([torch.stack([x.mean() for x in parts]).mean().item()] * 2)
    assert model[0].running_mean.item() == means[-1]


def test_the_time_of_estimating_batch_norm_anew_is_the_trainings(
    images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(loop, "estimate_batch_norm", lambda *_: clock.append(clock.pop() + 60.0))
    training = {"reestimate_batch_norm": True, "minutes": 1.5}
    history = run(images, small_cnn(), 5, training=training)
    assert [(record["train_seconds"], record["seconds"]) for record in history] == [(60, 60)] * 3


def test_a_batch_too_small_for_one_process_is_left_out_by_all(images: ImageSet) -> None:
    """11 images in batches of 4 leave one of 3, of which two processes have one and two."""
    data = ImageSet(images.images[:11], images.labels[:11], images.classes)
    numbers = []
    for number in range(2):
        settings = CrossEntropy(), THREAT, SGD(lr=0.1), Constant(), Training(batch_size=4)
        fitting = loop._Fitting(small_cnn(), data, *settings, Engine(accelerator="cpu").start(), 0, ())
        engine: Any = SimpleNamespace(
            processes=2,
            share=lambda count, number=number: range(count * number // 2, count * (number + 1) // 2),
            seed=torch.manual_seed,
        )
        fitting.engine = engine
        numbers.append(len(list(fitting.forwards())))
    assert numbers == [2, 2]


def test_the_sum_of_absolute_weights_is_added_to_the_loss(images: ImageSet) -> None:
    """Over matrices and kernels; a step of plain descent takes its sign off them, and nothing off a bias."""
    one, other = small_cnn(batch_norm=False), small_cnn(batch_norm=False)
    once, training = SGD(lr=0.5, momentum=0.0), {"steps": 1, "batch_size": 70}
    sizes = [p.abs().sum() for p in one.parameters() if p.dim() > 1]
    before = [p.detach().clone() for p in one.parameters()]
    plain = run(images, one, 1, optimizer=once, training=training, schedule=Constant())[0]
    penalised = {**training, "l1": 0.01}
    history = run(images, other, 1, optimizer=once, training=penalised, schedule=Constant())[0]
    assert history["l1"] == pytest.approx(torch.stack(sizes).sum().item(), rel=1e-5)
    assert history["loss"] - plain["loss"] == pytest.approx(0.01 * history["l1"], rel=1e-4)
    for start, first, second in zip(before, one.parameters(), other.parameters(), strict=True):
        expected = first - 0.5 * 0.01 * start.sign() * (start.dim() > 1)
        assert torch.allclose(second, expected, atol=1e-6)


def test_frozen_statistics_stay_those_it_started_with(images: ImageSet) -> None:
    model, _ = inputs_of(images, TRADES(steps=1, frozen_statistics=True), [])
    assert torch.equal(model[1].running_var, torch.ones(1))
    assert torch.equal(model[1].running_mean, torch.zeros(1))


@pytest.mark.parametrize(
    "objective",
    [GaussianNoise(), AWP(objective=AdversarialTraining(steps=1)), FreeAT(replays=2), InputGradient()],
    ids=lambda o: o.name,
)
def test_validating_the_average_changes_nothing(images: ImageSet, objective: Objective) -> None:
    plain, validated, found = small_cnn(), small_cnn(), []

    def validate(model: nn.Module) -> dict[str, float]:
        found.append(weights(model))
        return {"validation_standard": 0.5}

    training = {"averaging": {"decay": 0.9}, "augmentations": ["flip"]}
    run(images, plain, 2, objective.model_copy(deep=True), training=training)
    run(images, validated, 2, objective, training=training, validate=validate)
    assert torch.equal(weights(plain), weights(validated))
    assert torch.equal(found[-1], weights(validated))  # what is validated is what is kept


def test_lost_robustness_is_told_and_a_bad_start_is_not(images: ImageSet) -> None:
    told: list[str] = []

    class Listening(Reporter):
        def stage(self, text: str) -> None:
            told.append(text)

    def validating(*accuracies: tuple[float, float]) -> Callable[[nn.Module], dict[str, float]]:
        rows = iter(accuracies)
        return lambda model: dict(zip(("validation_standard", "validation_attacked"), next(rows), strict=True))

    falling = (0.5, 0.3), (0.6, 0.4), (0.7, 0.35), (0.8, 0.01)
    run(images, small_cnn(), validate=validating(*falling), reporter=Listening())
    assert not told  # natural training has nothing to lose
    run(images, small_cnn(), 4, FastAT(), validate=validating(*falling), reporter=Listening())
    assert [text for text in told if "40.0 % in epoch 2 to 1.0 %" in text and "catastrophic overfitting" in text]
    assert len(told) == 1
    rising = (0.9, 0.0), (0.5, 0.3), (0.3, 0.1), (0.6, 0.2)
    run(images, small_cnn(), 4, FastAT(), validate=validating(*rising), reporter=Listening())
    assert len(told) == 1  # where standard accuracy falls as well, it is something else


DEFENCES = [
    *(AWP(objective=TRADES(steps=2)), FreeAT(replays=2), FastAT(grad_align=0.1), MMA(steps=2), MART(steps=2)),
    *(LLR(), TULIP(), InputGradient(), CURE(), TRADES(steps=2), AdversarialTraining(steps=2), RST(steps=2)),
]


@pytest.mark.parametrize("objective", DEFENCES, ids=lambda o: o.name)
def test_every_defence_is_resumed_to_the_same_weights(
    images: ImageSet, tmp_path: Path, objective: Objective
) -> None:
    """With BatchNorm and Dropout, and from within an epoch."""
    saved: list[Checkpoint] = []

    def save(checkpoint: Checkpoint) -> None:
        checkpoint.save(tmp_path / f"{len(saved)}.pt")
        saved.append(checkpoint)

    straight, resumed = small_cnn(), small_cnn(seed=9)
    kept = run(images, straight, 2, objective, training={"checkpoint_every": 1}, save=save)
    assert int(straight[1].num_batches_tracked) == kept[-1]["step"] == 10 * objective.steps_per_batch
    middle = next(number for number, checkpoint in enumerate(saved) if checkpoint.partial)
    checkpoint = Checkpoint.load(tmp_path / f"{middle}.pt", torch.device("cpu"))
    assert 0 < checkpoint.step < 10
    assert checkpoint.step % objective.steps_per_batch == 0
    fresh = objective.model_copy(deep=True)
    history = run(images, resumed, 2, fresh, training={"checkpoint_every": 1}, resume=checkpoint)
    assert torch.equal(weights(resumed), weights(straight))
    assert [record["loss"] for record in history] == [record["loss"] for record in kept]


def test_replays_take_every_batch_several_times_and_accumulate_nothing(images: ImageSet) -> None:
    class Watcher(Observer):
        def __init__(self) -> None:
            self.seen: list[tuple[Tensor, Tensor]] = []

        def observe(self, x: Tensor, y: Tensor, x_adv: Tensor | None, progress: Progress) -> None:
            assert x_adv is not None
            self.seen.append((x, x_adv))

        def record(self) -> dict[str, float]:
            return {}

    watcher = Watcher()
    training = {"augmentations": ["crop-flip"]}
    run(images, small_cnn(), 1, FreeAT(replays=3), training=training, observers=[watcher])
    assert [len(x) for x, _ in watcher.seen] == [16] * 12 + [6] * 3
    for first in range(0, 15, 3):
        (x, a), (again, b), (_, c) = watcher.seen[first : first + 3]
        assert torch.equal(x, again)
        assert not torch.equal(a, b)
        assert not torch.equal(b, c)
    with pytest.raises(ValueError, match="replays each 3 times"):
        run(images, small_cnn(), 1, FreeAT(replays=3), training={"accumulate": 2})


def test_a_loss_that_is_not_finite_stops_the_training(images: ImageSet) -> None:
    class Diverging(Objective):
        name = "diverging"

        def loss(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress) -> Loss:
            total = model(x).sum() * (torch.nan if progress.step == 7 else 1.0)
            return Loss(total, {})

    saved: list[Checkpoint] = []
    with pytest.raises(
        TrainingDiverged, match=r"the loss is nan at epoch 2, step 3 of 5; the batch was training images \["
    ):
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


class _Pixels(Observer):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def observe(self, x: Tensor, y: Tensor, x_adv: Tensor | None, progress: Progress) -> None:
        self.seen.append(x.clone())


@pytest.mark.parametrize("objective", [Objective.registry[n]() for n in sorted(Objective.registry)])
@pytest.mark.parametrize("name", IN_PLACE)
def test_a_model_that_works_in_place_is_trained_like_one_that_does_not(
    images: ImageSet, objective: Objective, name: str
) -> None:
    few, pixels = images.subset(range(8)), images.images.clone()
    models, observers = twins(name), (_Pixels(), _Pixels())
    for model, observer in zip(models, observers, strict=True):
        run(few, model, 1, objective, training={"batch_size": 8}, observers=[observer])
    assert torch.equal(weights(models[0]), weights(models[1]))
    assert torch.equal(torch.cat(observers[0].seen), torch.cat(observers[1].seen))
    assert torch.equal(images.images, pixels)
    assert not models[0]._forward_pre_hooks
