"""The binarisation test: what is there by construction is found by sound attacks, and missed by blind ones."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import Trace, images, linear_model, small_cnn
from torch import Tensor, nn

from holdfast import Threat
from holdfast.analysis import attack_check
from holdfast.analysis.attack_check import Problems
from holdfast.attacks import PGD, Attack
from holdfast.data import load_data

THREATS = (Threat("linf", 0.1), Threat("l2", 0.5), Threat("l1", 3.0))
MARGIN = PGD(steps=20, loss="margin")
SQUARE = Attack.parse({"name": "square", "queries": 200})


class Behind(nn.Module):
    """A network that sees its input through a function."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.network, self.name = small_cnn(), name

    def forward(self, x: Tensor) -> Tensor:
        match self.name:
            case "quantised":
                return self.network((x * 8).round() / 8)
            case "without gradient":
                return self.network(x.detach())
            case "shattered":
                return self.network(x + 0.02 * torch.sin(200 * x))
            case "noisy":
                return self.network(x + 0.1 * torch.rand(x.shape))
            case "constant":
                return self.network(0 * x)
        return self.network(x).softmax(1)


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_what_is_there_by_construction_is_there_and_a_sound_attack_finds_it(threat: Threat) -> None:
    x, _ = images(16)
    for model in (small_cnn().eval(), linear_model(classes=4, shape=(1, 8, 8))):
        problems = Problems(model, x, threat)
        assert problems.made.all()
        assert problems.on == "features"
        assert (threat.distance(x, problems.x_adv) <= threat.eps * (1 + 1e-5)).all()
        for rows, readout in problems._parts:
            assert (readout(problems.x_adv[rows]).argmax(1) == 1).all()
            assert (readout(x[rows]).argmax(1) == 0).all()
        found = attack_check(model, x, threat, MARGIN, draws=32)
        assert found.rate >= 14 / 16  # of an l_1 ball steps of one entry at a time miss some
        assert found.random_rate <= 4 / 16


@pytest.mark.parametrize("name", ["quantised", "without gradient", "shattered"])
def test_a_gradient_that_is_hidden_shows(name: str) -> None:
    x, _ = images(16)
    found = attack_check(Behind(name), x, THREATS[0], MARGIN, draws=0)
    assert found.made.all()
    assert found.rate <= 1 / 16
    by_answers = attack_check(Behind(name), x, THREATS[0], SQUARE, draws=0)
    assert by_answers.rate > found.rate + 0.2


def test_an_attack_that_is_too_weak_shows() -> None:
    x, _ = images(16)
    weak = attack_check(small_cnn(), x, THREATS[0], PGD(steps=3, step_size=0.05, random_start=False))
    assert weak.rate == 0
    assert attack_check(small_cnn(), x, THREATS[0], MARGIN).rate >= 15 / 16


def test_networks_on_digits_are_no_reason_to_doubt_the_attack() -> None:
    x, _ = load_data("digits").test.batch(slice(16))
    for threat in (*THREATS, Threat("linf", 1e-3)):
        assert attack_check(small_cnn(10), x, threat, MARGIN, inner=32, draws=0).rate >= 14 / 16


def test_without_features_the_logits_are_read() -> None:
    x, _ = images(12)
    found = attack_check(Behind("softmax"), x, THREATS[0], MARGIN)
    assert found.on == "logits"
    assert found.made.sum() >= 9  # four of them tell fewer points apart
    assert found.rate >= 8 / 9


def test_where_nothing_changes_there_is_nothing_to_find() -> None:
    x, _ = images(6)
    found = attack_check(Behind("constant"), x, THREATS[0], MARGIN)
    assert not found.made.any()
    assert math.isnan(found.rate)
    assert math.isnan(found.random_rate)
    assert not attack_check(small_cnn(), x, Threat("linf", 1e-7), MARGIN).made.any()  # below rounding


@pytest.mark.parametrize("threat", [Threat("linf", 0.0), Threat("l0", 3)], ids=str)
def test_where_the_check_cannot_be_made_it_says_so(threat: Threat) -> None:
    x, _ = images(4)
    with pytest.raises(ValueError, match="expected eps > 0 in a norm other than l0"):
        attack_check(small_cnn(), x, threat, MARGIN)
    with pytest.raises(ValueError, match="answers at random"):
        attack_check(Behind("noisy"), x, THREATS[0], MARGIN)
    with pytest.raises(ValueError, match="and some images"):
        attack_check(small_cnn(), x[:0], THREATS[0], MARGIN)


def test_images_whose_balls_meet_are_told_apart() -> None:
    x, _ = images(6)
    alone = attack_check(small_cnn(), x, THREATS[0], MARGIN)
    problems = Problems(small_cnn(), torch.cat([x, x + 1e-3 * (x < 0.5)]), THREATS[0])
    assert [rows.tolist() for rows, _ in problems._parts] == [list(range(6)), list(range(6, 12))]
    twice = problems.check(MARGIN, problems.at_random(200))
    assert twice.made[:6].equal(alone.made)
    assert twice.found[:6].equal(alone.found)
    assert twice.at_random[:6].equal(alone.at_random)


def test_the_answer_hangs_on_no_batch_and_the_model_is_left_alone() -> None:
    x, _ = images(10)
    model = small_cnn().train()
    trace = Trace(model)
    one = attack_check(model, x, THREATS[0], MARGIN)
    trace.check()
    other = attack_check(model, x, THREATS[0], MARGIN, batch_size=3)
    assert one.found.equal(other.found)
    assert one.at_random.equal(other.at_random)


@pytest.mark.parametrize("name", ["apgd", "fmn", "ddn", "deepfool", "autoattack"])
def test_every_kind_of_attack_can_be_asked(name: str) -> None:
    x, _ = images(4)
    assert attack_check(small_cnn(), x, Threat("l2", 0.5), Attack.parse(name), inner=32, draws=8).rate >= 3 / 4
