"""The sandwich: certified ≤ attacked on every example, and an alarm when not."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import IN_PLACE, Shelf, Trace, images, linear_model, linear_radius, small_cnn, twins
from torch import Tensor, nn

from holdfast import Threat, evaluate
from holdfast.attacks import FGSM, PGD, Attack, AutoAttack, MultiTargeted
from holdfast.attacks.attack import Targets
from holdfast.certify import BoundCertifier, Certificate, Certifier, SoundnessError
from holdfast.evaluation import making, proportion_interval, sandwich_curve, stages
from holdfast.search import Ascent

THREAT = Threat("linf", 0.01)


class Everything(Certifier):
    """A wrong certifier: certifies whatever is right."""

    name = "everything"
    guarantee: str = "deterministic"

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, seed: int = 0, batch_size: int = 256
    ) -> Certificate:
        right = model.eval()(x).argmax(1) == y
        status = ["verified" if ok else "wrong" for ok in right]
        return Certificate(y.clone(), right, right.double() * threat.eps, status, self.guarantee)


def test_the_table_and_the_summary_tell_the_same_story() -> None:
    model, (x, y) = small_cnn(), images(80)
    evaluation = evaluate(model, x, y, THREAT, ["fgsm", PGD(steps=10)], ["bounds"], attack_certified=True)
    table, summary = evaluation.table, evaluation.summary
    assert len(table) == summary["examples"] == 80
    assert table["correct"].mean() == summary["standard"]
    assert (table["prediction"] == table["label"]).equals(table["correct"])
    assert (~table["pgd.success"]).mean() == summary["attacked"]["pgd"]
    assert table["bounds.verified"].mean() == summary["certified"]["bounds"]
    assert summary["certified"]["bounds"] <= summary["attacked"]["pgd"] <= summary["standard"]
    assert summary["bracket"]["attacked"] == (~(table["pgd.success"] | table["fgsm.success"])).mean()
    assert summary["counts"]["standard"] == table["correct"].sum()
    low, high = summary["intervals"]["standard"]
    assert low < summary["standard"] < high
    assert summary["threat"] == "linf:0.01"
    assert not (table["bounds.verified"] & table["pgd.success"]).any()
    assert table["pgd.success"][~table["correct"]].all()
    assert (table["pgd.distance"][~table["correct"]] == 0).all()
    assert np.isinf(table["pgd.distance"][~table["pgd.success"]]).all()
    assert summary["passes"]["pgd"]["forwards"] == table["pgd.forwards"].sum() > 0


def test_attacked_and_certified_accuracy_of_a_linear_model_equal_the_closed_form() -> None:
    model = linear_model(classes=2).double()
    x = torch.rand(200, 1, 2, 3, dtype=torch.float64)
    y = torch.randint(0, 2, (200,))
    exact = linear_radius(model, x, y, "linf")
    free = Threat("linf", 0.1, -torch.inf, torch.inf)
    assert ((exact - 0.1).abs() > 1e-4).all()
    summary = evaluate(model, x, y, free, [PGD(steps=20)], [BoundCertifier()], attack_certified=True).summary
    truth = (exact > 0.1).double().mean().item()
    assert summary["attacked"]["pgd"] == truth
    assert summary["certified"]["bounds"] == truth
    assert summary["standard"] == (exact > 0).double().mean().item()


def test_what_is_certified_is_attacked_only_if_asked() -> None:
    model, (x, y) = small_cnn(), images(80)
    for asked in (False, True):
        table = evaluate(model, x, y, THREAT, [FGSM()], [BoundCertifier()], attack_certified=asked).table
        assert table["fgsm.attacked"][table["correct"] & ~table["bounds.verified"]].all()
        assert not table["fgsm.attacked"][~table["correct"]].any()
        assert (table["fgsm.attacked"][table["bounds.verified"]] == asked).all()


def test_skipping_changes_no_verdict() -> None:
    model, (x, y) = small_cnn(), images(80)
    with_proofs = evaluate(model, x, y, THREAT, [PGD(steps=10)], [BoundCertifier()])
    without = evaluate(model, x, y, THREAT, [PGD(steps=10)])
    assert with_proofs.table["pgd.success"].equals(without.table["pgd.success"])


def test_a_wrong_certificate_rings_the_alarm_and_names_the_example() -> None:
    model, (x, y) = small_cnn(), images(80)
    threat = Threat("linf", 0.2)
    with pytest.raises(
        SoundnessError, match=r"example \d+ is certified by everything .* but pgd breaks it"
    ) as caught:
        evaluate(model, x, y, threat, [PGD(steps=10)], [Everything()], attack_certified=True)
    alarm = caught.value
    assert torch.equal(alarm.x, x[alarm.example])
    assert model.eval()(alarm.x_adv[None]).argmax() != y[alarm.example]
    assert threat.distance(alarm.x[None], alarm.x_adv[None]).item() <= 0.2 + 1e-6


def test_an_attack_nearer_than_a_certified_radius_rings_too() -> None:
    class TooFar(BoundCertifier):
        """Certifies nothing at eps, but claims radii that are too large."""

        def __call__(self, model, x, y, threat, **more) -> Certificate:  # type: ignore[no-untyped-def,override]
            honest = super().__call__(model, x, y, threat, **more)
            nothing = torch.zeros_like(honest.verified)
            return Certificate(honest.prediction, nothing, honest.radius + 1.0, honest.status, "deterministic")

    model, (x, y) = small_cnn(), images(80)
    with pytest.raises(SoundnessError, match="certified by bounds up to 1"):
        evaluate(model, x, y, Threat("linf", 0.2), [PGD(steps=10)], [TooFar()])


@pytest.mark.parametrize("guarantee", ["estimate", "probabilistic(0.001)"])
def test_only_deterministic_certificates_spare_examples_or_ring(guarantee: str) -> None:
    model, (x, y) = small_cnn(), images(40)
    evaluation = evaluate(model, x, y, Threat("linf", 0.2), [PGD(steps=5)], [Everything(guarantee=guarantee)])
    assert evaluation.table["pgd.attacked"].equals(evaluation.table["correct"])
    certified = evaluation.summary["bracket"]["certified"]
    assert certified is None if guarantee == "estimate" else certified == evaluation.summary["standard"]
    curve = sandwich_curve(model, x, y, Threat("linf", 0.2), evaluation, [PGD(steps=5)], [0.1])
    assert curve["certified"].isna().all() == (guarantee == "estimate")


def test_the_model_is_left_as_it_was_and_the_split_changes_nothing() -> None:
    model, (x, y) = small_cnn().train(), images(30)
    trace = Trace(model)
    whole = evaluate(model, x, y, THREAT, ["pgd"], ["bounds"]).table
    trace.check()
    split = evaluate(model, x, y, THREAT, ["pgd"], ["bounds"], batch_size=7).table
    assert whole["pgd.success"].equals(split["pgd.success"])
    assert whole["bounds.status"].equals(split["bounds.status"])


def test_attacks_or_certifiers_alone_will_do() -> None:
    model, (x, y) = small_cnn(), images(20)
    assert evaluate(model, x, y, THREAT).summary["bracket"] == {"certified": None, "attacked": None}
    assert evaluate(model, x, y, "linf:8/255", ["fgsm"]).summary["certified"] == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threat": "linf:-1"}, "≥ 0"),
        ({"attacks": ["pdg"]}, "did you mean 'pgd'"),
        ({"certifiers": ["bonds"]}, "did you mean 'bounds'"),
        ({"attacks": ["pgd", "pgd"]}, "listed twice"),
        ({"audit": 2}, "audit is a share"),
        ({"images": torch.zeros(0, 1, 8, 8), "labels": torch.zeros(0).long()}, "no examples"),
        ({"images": torch.full((2, 1, 8, 8), 255.0), "labels": torch.zeros(2).long()}, "box is"),
        ({"labels": torch.full((20,), 4)}, "label 4 does not fit a model of 4 classes"),
    ],
)
def test_bad_input_is_refused(change: dict[str, object], message: str) -> None:
    x, y = images(20)
    arguments = {"images": x, "labels": y, "threat": THREAT, "attacks": [], "certifiers": [], **change}
    with pytest.raises(ValueError, match=message):
        evaluate(small_cnn(), **arguments)  # type: ignore[arg-type]


def test_intervals_are_wilsons() -> None:
    # Newcombe (1998), table I: 15 of 148 gives 0.0624 to 0.1605; no successes of 20 give 0 to 0.1611.
    assert proportion_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert proportion_interval(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert proportion_interval(0, 0) == (0, 1)


def test_the_curve_agrees_with_the_table_at_its_own_radius() -> None:
    model, (x, y) = small_cnn(), images(80)
    threat, attacks = Threat("linf", 0.03), [PGD(steps=10)]  # 0.03 in float32 is less than 0.03
    for eps in (0.03, 0.1):  # and 0.1 in float32 is more
        threat = threat.with_eps(eps)
        evaluation = evaluate(model, x, y, threat, attacks, [BoundCertifier()], attack_certified=True)
        curve = sandwich_curve(model, x, y, threat, evaluation, attacks, [eps])
        assert curve["attacked"][0] == evaluation.summary["attacked"]["pgd"]
        assert curve["certified"][0] == evaluation.summary["certified"]["bounds"]


def test_the_curve_falls_and_never_crosses() -> None:
    model, (x, y) = small_cnn(), images(80)
    attacks: list[Attack] = [PGD(steps=10)]
    evaluation = evaluate(model, x, y, THREAT, attacks, [BoundCertifier()])
    radii = np.linspace(0, 0.1, 11).tolist()
    curve = sandwich_curve(model, x[:50], y[:50], THREAT, evaluation, attacks, radii)
    assert (curve["certified"] <= curve["attacked"]).all()
    assert (curve["attacked"] <= curve["standard"]).all()
    assert (curve[["attacked", "certified"]].diff().dropna() <= 0).all(axis=None)
    assert curve["attacked"].iloc[0] == curve["standard"].iloc[0] == evaluation.table["correct"][:50].mean()
    with pytest.raises(ValueError, match="must ascend"):
        sandwich_curve(model, x, y, THREAT, evaluation, attacks, [0.1, 0.03])
    nothing = evaluate(model, x, y, THREAT)
    assert sandwich_curve(model, x, y, THREAT, nothing, [], [0.1])[["attacked", "certified"]].isna().all(axis=None)


def test_an_evaluation_goes_on_from_its_finished_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "PIECE", 8)
    model, (x, y) = small_cnn(), images(60)
    y = torch.where(torch.arange(60) % 5 > 0, small_cnn().eval()(x).argmax(1), y)
    attacks = [{"name": "pgd", "steps": 5}, {"name": "apgd", "steps": 5}]
    arguments = (model, x, y, Threat("linf", 0.05), attacks, ["bounds"])
    whole = evaluate(*arguments)
    shelf = Shelf(8)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*arguments, store=shelf)
    shelf.most = 1000
    told: list[tuple[str, int, int]] = []
    given = shelf.given
    evaluate(small_cnn(seed=1), *arguments[1:], store=shelf)
    assert shelf.given == given  # what belongs to another model is not taken
    resumed = evaluate(*arguments, store=shelf, on_progress=lambda *news: told.append(news))
    assert shelf.given == 8
    assert resumed.table.equals(whole.table)
    assert (whole.seconds["bounds"] > 0).all()
    lefts = [left for name, _, left in told if name == "pgd"]
    assert lefts == sorted(lefts, reverse=True)
    assert lefts[-1] == 0
    for name, (rows, x_adv) in whole.adversarial.items():
        assert torch.equal(rows, resumed.adversarial[name][0])
        found = whole.table.iloc[rows.numpy()]
        assert found[f"{name}.success"].all()
        assert found[f"{name}.origin"].str.startswith(name).all()
        assert (model.eval()(x_adv).argmax(1) != y[rows]).all()


def test_an_evaluation_of_so_many_minutes_is_a_bracket_and_goes_on_to_the_same_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(making, "BLOCK", 16)
    model, (x, y) = small_cnn(), images(60)
    y = torch.where(torch.arange(60) % 5 > 0, small_cnn().eval()(x).argmax(1), y)
    arguments = (model, x, y, Threat("linf", 0.05), [{"name": "pgd", "steps": 5}, "ladder"], ["bounds"])
    whole, shelf = evaluate(*arguments), Shelf(1000)
    ticks = itertools.count()
    monkeypatch.setattr(stages.time, "monotonic", lambda: next(ticks))
    undecided = []
    for minutes in (0, 0.2, 0.5, 10):
        part = evaluate(*arguments, minutes=minutes, store=shelf)
        both = part.summary["bracket"]
        assert both["certified"] <= whole.summary["bracket"]["certified"]
        assert both["attacked"] >= whole.summary["bracket"]["attacked"]
        undecided.append(both["attacked"] - both["certified"])
        left = part.summary.get("not_reached", {})
        assert left.get("bounds", 0) == 60 - sum(len(rows) for name, rows, _ in shelf.pieces if "bounds" in name)
    assert undecided[0] == whole.summary["standard"]
    assert undecided == sorted(undecided, reverse=True)
    assert len(set(undecided)) > 2
    assert not left
    assert part.table.equals(whole.table)
    assert evaluate(*arguments, store=shelf).table.equals(whole.table)
    with pytest.raises(ValueError, match="minutes must be"):
        evaluate(*arguments, minutes=-1)


def test_a_sampling_certifier_votes_in_blocks_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "BLOCK", 8)
    model, (x, y) = small_cnn(), images(20)
    certifier = {"name": "smoothing", "sigma": 0.1, "n": 200}
    arguments = (model, x, y, Threat("l2", 0.05), [], [certifier])
    assert evaluate(*arguments, minutes=10).table.equals(evaluate(*arguments).table)
    nothing = evaluate(*arguments, minutes=0)
    assert nothing.summary["not_reached"] == {"smoothing": 20}
    assert nothing.summary["certified"] == {"smoothing": 0.0}


def test_time_goes_where_it_decides_most() -> None:
    asked: list[tuple[str, int]] = []
    ticks = iter(range(10**6))

    def step(name: str, gain: int | None) -> Any:
        def ask(rows: Tensor) -> int | None:
            asked.append((name, int(rows[0])))
            next(ticks)
            return gain

        return ask

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.time, "monotonic", lambda: next(ticks))
        stages.spend([step("poor", 1), step("rich", 5), step("known", None)], 5, 1, stages.Clock(0, 60))
    assert [name for name, _ in asked[:2]] == ["poor", "poor"]  # what is untried waits for its share of the time
    assert "known" in dict(asked)
    first = asked.index(("rich", 0))
    assert first < asked.index(("poor", 4))
    assert asked[first + 1][0] == "rich"  # and then takes what it can get


def test_classes_that_certificates_exclude_are_not_attacked(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, _) = linear_model(classes=10, shape=(1, 8, 8)), images(40)
    y = model(x).argmax(1)
    eps = linear_radius(model, x, y, "linf").quantile(0.6).item()
    told: list[Tensor | None] = []
    plain = MultiTargeted.perturb

    def perturb(self: MultiTargeted, network: nn.Module, targets: Targets, threat: Threat) -> Ascent:
        told.append(targets.open)
        return plain(self, network, targets, threat)

    monkeypatch.setattr(MultiTargeted, "perturb", perturb)
    attacks = [MultiTargeted(steps=20)]
    threat = Threat("linf", eps, -math.inf, math.inf)
    with_bounds = evaluate(model, x, y, threat, attacks, ["bounds"], audit=0)
    alone = evaluate(model, x, y, threat, attacks)
    assert told[0] is not None
    assert told[-1] is None
    gaps = model(x)[:, :, None] - model(x)[:, None]
    slopes = (model[1].weight[:, None] - model[1].weight[None]).abs().sum(2)
    reachable = (gaps - eps * slopes)[torch.arange(40), y] <= 1e-5
    attacked = torch.tensor(with_bounds.table["multi-targeted.attacked"])
    assert (told[0] <= reachable[attacked]).all()
    assert (with_bounds.table["multi-targeted.success"] == alone.table["multi-targeted.success"]).all()
    spent = [one.table["multi-targeted.forwards"].sum() for one in (with_bounds, alone)]
    assert spent[0] < spent[1] / 4
    reference = evaluate(model, x, y, threat, [AutoAttack(version="quick", reference=True)], ["bounds"])
    assert reference.table["autoattack.attacked"].all()


def test_a_minimum_norm_attack_tells_distances_beyond_eps_and_rings_within_a_certificate() -> None:
    model, (x, _) = linear_model(classes=2, shape=(1, 8, 8)), images(20)
    y = model(x).argmax(1)
    radius = linear_radius(model, x, y, "l2")
    eps = radius.median().item()
    table = evaluate(model, x, y, Threat("l2", eps, -math.inf, math.inf), ["fmn"]).table
    assert np.allclose(table["fmn.distance"], radius.numpy(), rtol=0.05)
    assert 0 < table["fmn.success"].sum() < 20
    assert ((table["fmn.distance"] <= eps) == table["fmn.success"]).all()

    with pytest.raises(SoundnessError, match="certified by everything up to 100"):
        evaluate(model, x, y, Threat("l2", 1e-6, -math.inf, math.inf), ["fmn"], [Far()], attack_certified=True)


class Far(Everything):
    """Claims a radius of 100."""

    def __call__(self, *arguments: Any, **more: Any) -> Certificate:
        certificate = super().__call__(*arguments, **more)
        return replace(certificate, radius=100 * certificate.verified.double())


def test_a_certificate_for_a_wrong_example_rings() -> None:
    class Blind(Everything):
        def __call__(self, *arguments: Any, **more: Any) -> Certificate:
            certificate = super().__call__(*arguments, **more)
            return replace(certificate, verified=torch.ones_like(certificate.verified))

    model, (x, y) = small_cnn(), images(30)
    with pytest.raises(SoundnessError, match="gets it wrong as it is"):
        evaluate(model, x, y, THREAT, ["pgd"], [Blind()])


def test_a_minimum_norm_attack_is_the_whole_curve_also_beyond_certificates() -> None:
    model, (x, _) = linear_model(classes=2, shape=(1, 8, 8)), images(40)
    y = model(x).argmax(1)
    radius = linear_radius(model, x, y, "l2").numpy()
    threat = Threat("l2", float(np.median(radius)), -math.inf, math.inf)
    attacks = [Attack.parse("fmn")]
    evaluation = evaluate(model, x, y, threat, attacks, ["bounds"])
    radii = [factor * threat.eps for factor in (0, 0.5, 1.05, 2)]
    curve = sandwich_curve(model, x, y, threat, evaluation, attacks, radii)
    without = evaluate(model, x, y, threat, [], ["bounds"])
    assert sandwich_curve(model, x, y, threat, without, attacks, radii)["attacked"].equals(curve["attacked"])
    for eps, accuracy in zip(radii, curve["attacked"], strict=True):
        assert (radius > eps).mean() - 1e-9 <= accuracy <= (radius > 0.95 * eps).mean() + 1e-9


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_model_that_works_in_place_is_evaluated_like_one_that_does_not(name: str) -> None:
    models, (x, _), threat = twins(name), images(20), Threat("linf", 0.05)
    y, before = models[1].eval()(x).argmax(1), x.clone()
    found, expected = (
        evaluate(model, x, y, threat, ["pgd", "square"], ["bounds"], lipschitz_examples=2) for model in models
    )
    assert torch.equal(x, before)
    pd.testing.assert_frame_equal(found.table, expected.table)
    assert found.summary["warnings"] == expected.summary["warnings"]


def test_of_what_a_certifier_was_not_asked_there_is_no_counterexample() -> None:
    y = torch.zeros(3, dtype=torch.int64)
    one = Certificate(
        y[:1], y[:1].bool(), y[:1].double(), ["refuted"], "deterministic", counterexample=torch.ones(1, 2)
    )
    stage: stages.Stage[Certificate] = stages.Stage("some", lambda rows, keep: one)
    stage.about(torch.tensor([1]))
    whole = stages.certificate_of(stage, y, y, "deterministic")
    assert whole.status == ["undecided", "refuted", "undecided"]
    assert whole.counterexample is not None
    assert whole.counterexample.isnan().all(1).tolist() == [True, False, True]
