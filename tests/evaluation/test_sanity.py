"""Signs of weak attacks, wrong labels and batches that matter: each is raised by what shows it, and by no other."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import images, linear_model, small_cnn
from torch import Tensor, nn

from holdfast import Threat, evaluate
from holdfast.attacks import PGD, Attack
from holdfast.data import load_data
from holdfast.evaluation.sanity import (
    batch_dependence,
    excessive_radius,
    hidden_gradients,
    misplaced_labels,
    randomness,
    suspicions,
    unpredicted_classes,
)

THREAT = Threat("linf", 0.1)


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = small_cnn()


class Moody(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.network(x + 0.1 * torch.rand(x.shape))


class Probabilities(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).softmax(1)


class Sigmoids(Wrapped):
    """One-vs-rest, and sure of itself."""

    def forward(self, x: Tensor) -> Tensor:
        return (200 * self.network(x)).sigmoid()


class Squashed(nn.Module):
    """Saturated before a last layer, which mixes what is."""

    def __init__(self) -> None:
        super().__init__()
        self.network = linear_model(classes=4, shape=(1, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        mixing = torch.eye(4) + 0.3 * torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
        return (12 * self.network(x)).sigmoid() @ mixing


class Quantised(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.network((x * 8).round() / 8)


class Shattered(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.network(x + 0.02 * torch.sin(200 * x))


class WithLogs(Wrapped):
    """Log-probabilities, which cross-entropy takes like logits."""

    def forward(self, x: Tensor) -> Tensor:
        return (30 * self.network(x)).log_softmax(1)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(context: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return -gradient


class Misleading(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.network(Reversed.apply(x))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Probabilities, "are probabilities, not logits"),
        (Sigmoids, "the outputs are saturated"),
        (Squashed, "the gradients fade"),
        (Quantised, "exactly zero for 60 of 60"),
        (Misleading, "more steps do not raise the loss"),
    ],
)
def test_each_sign_is_seen(model: type[nn.Module], words: str) -> None:
    x, _ = images(60)
    x[:20, :, 0, 0] = 0
    (text,) = suspicions(model(), x, model().eval()(x).argmax(1), THREAT)
    assert words in text


@pytest.mark.parametrize("count", [1, 3, 60])
def test_honest_models_raise_no_doubts(count: int) -> None:
    x, _ = images(count)
    for model in (small_cnn(), linear_model(classes=4, shape=(1, 8, 8)), WithLogs()):
        for threat in (THREAT, Threat("linf", 0.8), Threat("l2", 5.0), Threat("linf", 8.0)):
            assert suspicions(model, x, model.eval()(x).argmax(1), threat) == []


def test_outputs_that_come_to_one_from_either_side_are_not_saturated() -> None:
    x, y = load_data("digits").test.batch(slice(40))
    flat, target = x.flatten(1), nn.functional.one_hot(y, 10).float()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        model[1].weight.copy_((torch.linalg.pinv(flat.double()) @ target.double()).T)
        model[1].bias.zero_()
    assert ((model(x) - target).abs() < 0.01).double().mean() > 0.5
    assert suspicions(model, x, y, Threat("linf", 1e-3)) == []


def test_networks_on_digits_raise_no_doubts() -> None:
    x, y = load_data("digits").test.batch(slice(64))
    for seed in range(3):
        assert suspicions(small_cnn(10, seed=seed), x, y, THREAT) == []


@pytest.mark.parametrize("count", [1, 40])
def test_answers_at_random_are_told_whatever_is_run(count: int) -> None:
    x, y = images(count)
    assert randomness(small_cnn(), x) == []
    (text,) = randomness(Moody(), x)
    assert "answers at random" in text
    assert "run ladder or apgd with samples=20" in text
    assert text in evaluate(Moody(), x, y, THREAT).summary["warnings"]


@pytest.mark.parametrize("model", [Quantised, Shattered])
def test_gradients_that_lead_nowhere_are_told_where_the_attacks_pay_for_it(model: type[nn.Module]) -> None:
    x, _ = images(32)
    how = {"seed": 0, "batch_size": 256}
    (text,) = hidden_gradients(model(), x, THREAT, 100_000, **how)
    assert text.startswith("the gradients are hidden: of 16 adversarial examples")
    assert hidden_gradients(model(), x, THREAT, 10_000, **how) == []
    y = model().eval()(x).argmax(1)
    warnings = evaluate(model(), x, y, THREAT, [PGD(steps=400, loss="margin")]).summary["warnings"]
    assert any("the gradients are hidden" in text for text in warnings)


def test_gradients_that_lead_somewhere_are_not_doubted() -> None:
    x, _ = load_data("digits").test.batch(slice(32))
    how = {"seed": 0, "batch_size": 256}
    for model in (small_cnn(10), nn.Sequential(nn.Flatten(), nn.Linear(64, 10))):
        for threat in (THREAT, Threat("l2", 0.5), Threat("linf", 0.0), Threat("l0", 3), Threat("linf", 8.0)):
            assert hidden_gradients(model, x, threat, 100_000, **how) == []
    assert hidden_gradients(Moody(), images(32)[0], THREAT, 100_000, **how) == []  # that is told elsewhere


@pytest.mark.parametrize(
    ("threat", "words"),
    [
        ("linf:8", ["is the whole box", "write linf:8/255"]),
        ("linf:1", ["is the whole box", "write linf:1/255"]),
        ("linf:0.5", ["meet in the middle"]),
        ("l2:128", ["is the whole box", "write l2:128/255"]),
        ("l2:4", ["meet in the middle", "write l2:4/255"]),
        ("l1:64", ["is the whole box"]),
    ],
)
def test_a_radius_in_pixels_is_told(threat: str, words: list[str]) -> None:
    (text,) = excessive_radius(Threat.parse(threat), images(2)[0])
    assert all(word in text for word in words)
    assert ("255" in text) == ("255" in "".join(words))
    x, y = images(20)
    assert text in evaluate(small_cnn(), x, y, threat).summary["warnings"]


def test_a_radius_in_units_of_the_inputs_is_not() -> None:
    x, _ = images(2)
    for threat in ("linf:8/255", "linf:0.4", "l2:3.9", "l1:31", "l0:64", "linf:0"):
        assert excessive_radius(Threat.parse(threat), x) == []
    assert excessive_radius(Threat("linf", 8, 0, 255), x) == []
    assert excessive_radius(Threat("linf", 8, -float("inf"), float("inf")), x) == []


def test_an_attack_knows_which_of_its_parts_see_answers_only() -> None:
    attack, square = Attack.parse("autoattack"), Attack.parse("square")
    blind = {part.name: attack.found_blindly(part.describe(0, 3)) for part in attack.parts(THREAT, 10)}
    assert blind == {"pgd": False, "apgd": False, "apgd-t": False, "fab": False, "square": True}
    assert square.found_blindly(square.describe(0, 3))
    thorough = {name for name, member in Attack.registry.items() if member.thorough}
    assert thorough == {"pgd", "multi-targeted", "apgd", "apgd-t", "autoattack", "ladder"}


def test_what_only_a_blind_attack_breaks_is_told() -> None:
    x, _ = images(60)
    model = Quantised()
    y = model.eval()(x).argmax(1)
    attacks = [PGD(steps=5, random_start=False), {"name": "square", "queries": 200}]
    summary = evaluate(model, x, y, Threat("linf", 0.3), attacks).summary
    assert summary["attacked"]["square"] < summary["attacked"]["pgd"]
    assert any("sees answers only" in text for text in summary["warnings"])
    plain = evaluate(small_cnn(), x, y, THREAT, ["pgd", {"name": "square", "queries": 50}]).summary
    assert plain["warnings"] == []


class Centred(Wrapped):
    """Its answers depend on the batch without any BatchNorm."""

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x - x.mean(0))


def forgetful() -> nn.Module:
    model = small_cnn()
    model[1] = nn.BatchNorm2d(6, track_running_stats=False)
    return model


@pytest.mark.parametrize("count", [2, 3, 40])
def test_answers_that_depend_on_the_batch_are_told_and_the_batch_norm_named(count: int) -> None:
    x, _ = images(count)
    (named,) = batch_dependence(forgetful(), x)
    assert "depends on its batch" in named
    assert "BatchNorm without running statistics: '1'" in named
    (other,) = batch_dependence(Centred(), x)
    assert "depends on its batch" in other
    assert "BatchNorm" not in other


def test_no_other_model_is_said_to_depend_on_the_batch() -> None:
    x, _ = images(40)
    for model in (small_cnn(), small_cnn().double(), linear_model(classes=4, shape=(1, 8, 8)), Moody()):
        assert batch_dependence(model, x.to(next(model.parameters()))) == []
    assert batch_dependence(forgetful(), x[:1]) == []  # nothing to compare with


def test_a_model_of_one_batch_size_is_told() -> None:
    class Fixed(Wrapped):
        def forward(self, x: Tensor) -> Tensor:
            return self.network(x.view(20, 1, 8, 8))

    (text,) = batch_dependence(Fixed(), images(20)[0])
    assert "does not take a batch of 2, though it takes one of 20" in text


def answers(label: np.ndarray, prediction: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"label": label, "prediction": prediction})


def mostly_right(count: int, classes: int, accuracy: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Classes, and answers that are right so often and drawn otherwise."""
    generator = np.random.default_rng(seed)
    truth, other = generator.integers(0, classes, (2, count))
    return truth, np.where(generator.random(count) < accuracy, truth, other)


def test_labels_in_another_order_are_told_with_both_accuracies_and_the_order() -> None:
    truth, prediction = mostly_right(500, 10, 0.8)
    right = 100 * (truth == prediction).mean()
    swapped = np.where(truth == 3, 5, np.where(truth == 5, 3, truth))
    for label, words in (
        (truth + 1, "with labels 1 to 10 one lower"),
        (swapped, "with 3 and 5 swapped"),
        ((truth + 3) % 10, "0 → 7, 1 → 8"),
        (9 - truth, "0 → 9"),
    ):
        (text,) = misplaced_labels(answers(label, prediction))
        assert f"{100 * (label == prediction).mean():.1f} % of the answers are right as they are" in text
        assert f"{right:.1f} % would be" in text
        assert words in text
    shuffled = np.random.default_rng(1).permutation(100)
    truth, prediction = mostly_right(2000, 100, 0.4)
    (text,) = misplaced_labels(answers(shuffled[truth], prediction))
    assert "in an order that moves" in text


def test_bad_models_and_few_images_are_no_sign_of_another_order() -> None:
    for seed in range(40):
        for count, classes in ((5, 2), (20, 10), (200, 10), (1000, 100)):
            for accuracy in (0.0, 0.2, 0.9):
                assert misplaced_labels(answers(*mostly_right(count, classes, accuracy, seed))) == []
    truth, prediction = mostly_right(500, 10, 0.6)
    assert misplaced_labels(answers(truth, np.zeros_like(truth))) == []  # one answer to everything
    assert misplaced_labels(answers(np.minimum(truth, 1), np.zeros_like(truth))) == []  # though most are of class 1
    merged = np.where(prediction == 4, 9, prediction)
    assert misplaced_labels(answers(truth, merged)) == []  # no order makes up for a class that is never predicted
    few = mostly_right(8, 4, 0.9)
    assert misplaced_labels(answers((few[0] + 1) % 4, few[1])) == []


def test_untrained_networks_are_no_sign_of_another_order() -> None:
    data = load_data("digits").test
    x, y = data.batch(slice(None))
    for seed in range(10):
        torch.manual_seed(seed)
        for model in (small_cnn(10, seed=seed).eval(), nn.Sequential(nn.Flatten(), nn.Linear(64, 10))):
            prediction = model(x).argmax(1)
            assert misplaced_labels(answers(y.numpy(), prediction.numpy())) == []


def test_an_accuracy_far_below_chance_is_told() -> None:
    generator = np.random.default_rng(0)
    label = generator.integers(0, 10, 400)
    (text,) = misplaced_labels(answers(label, (label + generator.integers(1, 10, 400)) % 10))
    assert text.startswith("0.0 % of the answers are right, far fewer than the 10.")


def test_classes_that_are_never_predicted_are_named() -> None:
    label = np.repeat([0, 1, 2, 3], [30, 20, 10, 9])
    assert unpredicted_classes(answers(label, label)) == []
    assert unpredicted_classes(answers(label, np.where(label == 3, 0, label))) == []  # nine may all be missed
    (one,) = unpredicted_classes(answers(label, np.where(label == 2, 0, label)))
    assert one == "class 2 is never predicted, though 10 of 69 images are of it"
    (two,) = unpredicted_classes(answers(label, np.where(label < 2, 2, label)))
    assert two == "classes 0, 1 are never predicted, though 50 of 69 images are of them"
    (all_one,) = unpredicted_classes(answers(label, np.full_like(label, 7)))
    assert all_one == "the model answers with class 7 to every one of 69 images of 4 classes"
    assert unpredicted_classes(answers(label[:30], label[:30])) == []  # one class, and only that is asked
    few = np.arange(20) % 10  # two of each class
    (same,) = unpredicted_classes(answers(few, np.full_like(few, 3)))
    assert same == "the model answers with class 3 to every one of 20 images of 10 classes"
    assert unpredicted_classes(answers(few[:10], np.full(10, 3))) == []  # nine may all be missed


@pytest.mark.parametrize("how", [{}, {"certifiers": ["bounds"]}, {"attacks": ["fgsm"]}])
def test_what_is_odd_about_model_and_labels_is_told_whatever_is_run(how: dict[str, list[str]]) -> None:
    x, _ = images(80)
    model = linear_model(classes=4, shape=(1, 8, 8))
    y = model(x).argmax(1)
    order = torch.tensor([1, 2, 3, 0])
    assert evaluate(model, x, y, Threat("linf", 0.001), **how).summary["warnings"] == []
    told = evaluate(model, x, order[y], Threat("linf", 0.001), **how).summary["warnings"]
    assert any("in another order" in text for text in told)
    if "certifiers" not in how:  # bounds refuse it
        told = evaluate(forgetful(), x, y, THREAT, **how).summary["warnings"]
        assert any("depends on its batch" in text for text in told)


def test_the_network_under_a_smoothed_classifier_is_asked() -> None:
    x, y = images(4)
    smoothing = {"name": "smoothing", "n": 200}
    told = evaluate(forgetful(), x, y, Threat("l2", 0.1), certifiers=[smoothing]).summary["warnings"]
    assert any("depends on its batch" in text for text in told)
