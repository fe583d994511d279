"""The contract of every registered objective."""

from __future__ import annotations

import pytest
import torch
from helpers import images, linear_model, small_cnn

from holdfast import Threat
from holdfast.draws import Draws
from holdfast.objectives import AWP, Objective, Progress

NAMES = sorted(Objective.registry)
every_objective = pytest.mark.parametrize("objective", [Objective.registry[n]() for n in NAMES], ids=NAMES)
THREAT = Threat("linf", 0.1)
PROGRESS = Progress(3, 10, seed=1)


@every_objective
def test_a_step_is_reproducible_and_lowers_the_loss(objective: Objective) -> None:
    x, y = images(32)
    model = small_cnn().train()
    model[5].p = 0.0  # without Dropout noise, so that the loss before and after compare
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = objective.loss(model, x, y, THREAT, PROGRESS).total
    fresh = small_cnn().train()
    fresh[5].p = 0.0
    assert torch.equal(before, objective.loss(fresh, x, y, THREAT, PROGRESS).total)
    for _ in range(5):
        optimizer.zero_grad()
        objective.loss(model, x, y, THREAT, PROGRESS).total.backward()
        optimizer.step()
    assert objective.loss(model, x, y, THREAT, PROGRESS).total < before


@every_objective
def test_modes_and_gradients_are_left_alone(objective: Objective) -> None:
    x, y = images(8)
    model = small_cnn().train()
    model[5].eval()
    modes = [module.training for module in model.modules()]
    before = x.clone()
    loss = objective.loss(model, x, y, THREAT, PROGRESS)
    assert [module.training for module in model.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(x, before)
    assert loss.total.requires_grad
    assert not any(part.requires_grad for part in loss.parts.values())
    assert all(part.dim() == 0 for part in loss.parts.values())


@every_objective
def test_batch_norm_sees_one_training_forward(objective: Objective) -> None:
    x, y = images(8)
    model = small_cnn().train()
    objective.loss(model, x, y, THREAT, PROGRESS)
    assert model[1].num_batches_tracked == 1
    model.eval()
    objective.loss(model, x, y, THREAT, PROGRESS)
    assert model[1].num_batches_tracked == 1


@every_objective
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_what_it_trains_on_lies_in_the_threat_set(objective: Objective, norm: str) -> None:
    x, y = images(8)
    threat = Threat(norm, {"linf": 0.1, "l2": 0.5, "l1": 3.0}[norm])
    loss = objective.loss(small_cnn().train(), x, y, threat, PROGRESS)
    assert torch.isfinite(loss.total)
    if loss.x_adv is not None:
        reach = getattr(objective, "hinge", 1) * threat.eps  # max-margin training looks further
        assert (threat.distance(x, loss.x_adv) <= reach + 1e-5).all()
        assert loss.x_adv.min() >= 0
        assert loss.x_adv.max() <= 1
        assert not torch.equal(loss.x_adv, x)


# GloRo's extra class counts the runner-up even at radius 0, TAPS and STAPS multiply two losses; others add noise
# or ask for a margin whatever the radius.
OTHERWISE = {
    "gloro",
    "taps",
    "staps",
    "logit-annealing",
    "gaussian-noise",
    "smooth-adv",
    "macer",
    "consistency",
    "stability",
} | {
    *("offset-cross-entropy", "margin-hinge", "certificate-regularisation"),
    *("tulip", "input-gradient", "cure", "mart", "clean-plus-adversarial", "rst", "awp", "mma"),
}


@pytest.mark.parametrize("objective", [Objective.registry[n]() for n in NAMES if n not in OTHERWISE])
def test_without_a_radius_an_objective_is_natural_training(objective: Objective) -> None:
    x, y = images(16)
    model = small_cnn().eval()
    natural = torch.nn.functional.cross_entropy(model(x), y)
    loss = objective.loss(model, x, y, Threat("linf", 0.0), Progress.end())
    assert loss.total.item() == pytest.approx(natural.item(), abs=1e-5)


@every_objective
def test_an_example_draws_what_it_draws_in_the_whole_batch(objective: Objective) -> None:
    """So do processes that share a batch, and batches that are accumulated to one step."""
    x, y = images(12)
    model = small_cnn().eval()
    whole = objective.loss(model, x, y, THREAT, Progress(3, 10, seed=1, images=12))
    parts = [
        objective.loss(model, x[rows], y[rows], THREAT, Progress(3, 10, seed=1, offset=rows.start, images=12))
        for rows in (slice(0, 5), slice(5, 12))
    ]
    if objective.name != "awp":  # whose step in the weights is the whole batch's
        assert (5 * parts[0].total + 7 * parts[1].total).item() / 12 == pytest.approx(whole.total.item(), abs=1e-5)
    if whole.x_adv is not None:
        assert torch.allclose(torch.cat([part.x_adv for part in parts]), whole.x_adv, atol=1e-5)


def test_noise_hangs_on_the_image_and_the_copy_alone() -> None:
    x = torch.zeros(6, 1, 5, 5)
    noise = Progress(3, 10, seed=1).normal(x, 3, 11).view(3, 6, 1, 5, 5)
    assert torch.equal(Progress(3, 20, seed=1, offset=4).normal(x[4:], 2, 11).view(2, 2, 1, 5, 5), noise[:2, 4:])
    assert len({tuple(one.flatten().tolist()) for one in noise.flatten(0, 1)}) == 18
    assert not torch.equal(Progress(3, 10, seed=1).normal(x), noise[0])  # without the salt
    assert not torch.equal(Progress(4, 10, seed=1).normal(x, 3, 11).view_as(noise), noise)
    assert torch.equal(Progress(3, 10, seed=1).normal(x).flatten(1), Draws.of(1, range(6), 3).normal(25))


@every_objective
def test_presenting_a_batch_makes_the_training_forward_and_leaves_no_gradient(objective: Objective) -> None:
    x, y = images(8)
    model = small_cnn().train()
    trained, progress = small_cnn().train(), Progress(8, 16, seed=1)  # a first replay
    loss = objective.objective if isinstance(objective, AWP) else objective
    seed = torch.get_rng_state()
    loss.loss(trained, x, y, THREAT, progress)
    torch.set_rng_state(seed)
    objective.present(model, x, y, THREAT, progress)
    assert model[1].num_batches_tracked == objective.steps_per_batch
    if objective.steps_per_batch == 1:
        assert torch.equal(model[1].running_mean, trained[1].running_mean)
        assert torch.equal(model[1].running_var, trained[1].running_var)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_progress_ends_at_one() -> None:
    assert Progress(0, 4).fraction == 0
    assert Progress.end().fraction == 1


@pytest.mark.parametrize("name", ["adversarial", "trades", "input-gradient", "crown-ibp"])
def test_a_loss_is_the_same_for_who_asks_without_gradients(name: str) -> None:
    x, y = images(5)
    objective, model = Objective.parse(name), linear_model(4, (1, 8, 8))
    expected = objective.loss(model, x, y, Threat("linf", 0.05), Progress.end()).total.item()
    with torch.no_grad():
        asked = objective.loss(model, x, y, Threat("linf", 0.05), Progress.end()).total.item()
    assert asked == pytest.approx(expected)
    with torch.inference_mode():
        asked = objective.loss(model, x.clone(), y, Threat("linf", 0.05), Progress.end()).total.item()
    assert asked == pytest.approx(expected)
