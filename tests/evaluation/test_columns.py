"""What a certifier refutes is broken, in every column and number that an attack has a say in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import Shelf, images, small_cnn
from torch import Tensor, nn

from holdfast import Threat, evaluate
from holdfast.certify import BranchAndBoundCertifier, Certificate, SoundnessError
from holdfast.evaluation import making, sandwich_curve, stages
from holdfast.evaluation.columns import refutations

NAME, THREAT = "branch-and-bound", Threat("linf", 0.03)
CERTIFIER = {"name": NAME, "seconds": 5}


def asked() -> tuple[nn.Module, Tensor, Tensor]:
    model, (x, _) = small_cnn(), images(16)
    y = model.eval()(x).argmax(1)
    y[3] = (y[3] + 1) % 3
    return model, x, y


def test_what_is_refuted_counts_as_broken_everywhere() -> None:
    model, x, y = asked()
    found = evaluate(model, x, y, THREAT, ["fgsm"], [CERTIFIER, "bounds"])
    table, summary = found.table, found.summary
    refuted = table[f"{NAME}.status"] == "refuted"
    assert refuted.any()
    assert table[f"{NAME}.verified"].any()
    assert table[f"{NAME}.success"].equals(refuted | ~table["correct"])
    assert (table[f"{NAME}.distance"][refuted] <= THREAT.eps).all()
    assert (table[f"{NAME}.distance"][~table["correct"]] == 0).all()
    assert np.isinf(table[f"{NAME}.distance"][~refuted & table["correct"]]).all()
    assert (table[f"{NAME}.origin"] != "").equals(refuted)
    assert summary["attacked"][NAME] == (~table[f"{NAME}.success"]).mean()
    assert summary["bracket"]["attacked"] == (~(table[f"{NAME}.success"] | table["fgsm.success"])).mean()
    assert summary["bracket"]["certified"] <= summary["bracket"]["attacked"]
    assert NAME not in summary["passes"]
    rows, x_adv = found.adversarial[NAME]
    assert rows.tolist() == list(np.flatnonzero(refuted))
    assert (model(x_adv).argmax(1) != y[rows]).all()
    # It is the upper end where nobody attacks, and at the radii of a curve.
    alone = evaluate(model, x, y, THREAT, certifiers=[CERTIFIER])
    assert alone.summary["bracket"]["attacked"] == alone.summary["attacked"][NAME] == 1 - (refuted.sum() + 1) / 16
    curve = sandwich_curve(model, x, y, THREAT, alone, [], [0.0, 0.01, THREAT.eps, 0.3])
    assert curve["attacked"].notna().all()
    assert (curve["certified"] <= curve["attacked"]).all()
    assert (curve["attacked"].diff().dropna() <= 0).all()
    at_eps = curve[curve["eps"] == THREAT.eps].iloc[0]
    assert at_eps["attacked"] == alone.summary["bracket"]["attacked"]
    assert at_eps["certified"] == alone.summary["bracket"]["certified"]
    assert curve["attacked"].iloc[-1] < at_eps["attacked"]  # by counterexamples at that radius
    # Adversarial images that were not kept are not missed.
    assert (
        sandwich_curve(model, x, y, THREAT, replace(alone, adversarial={}), [], [0.0, 0.01]).notna().all(axis=None)
    )


def test_a_counterexample_is_held_against_the_other_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = asked()
    sure = Certificate(
        y,
        torch.ones_like(y).bool(),
        torch.full((16,), 0.5, dtype=torch.float64),
        ["verified"] * 16,
        "deterministic",
    )

    class Sure(BranchAndBoundCertifier):
        name = "sure"

        def __call__(self, *arguments: object, **settings: object) -> Certificate:
            return sure

    y[3] = model(x[3:4]).argmax(1)
    with pytest.raises(SoundnessError, match=f"certified by sure up to 0.5 in linf:0.03, but {NAME} breaks it"):
        evaluate(model, x, y, THREAT, certifiers=[CERTIFIER, Sure()])


def test_a_counterexample_is_confirmed_as_any_adversarial_image_is() -> None:
    model, x, y = (*asked()[:1], *(part[:3] for part in asked()[1:]))
    x_adv = torch.full_like(x, torch.nan)
    x_adv[:2] = x[:2]  # right there
    x_adv[2] = (x[2] + 0.5).clamp(0, 1)  # too far, whatever the model answers
    y[2] = (model(x_adv[2:]).argmax() + 1) % 3
    words = ["refuted", "undecided", "refuted"]
    certificate = Certificate(y, y < 0, y.double(), words, "deterministic", counterexample=x_adv)
    rows, result = refutations(NAME, certificate, model, x, y, THREAT, 256)
    assert rows.tolist() == [0, 2]
    assert not result.success.any()
    assert result.adversarial_distance.isinf().all()


def test_an_evaluation_that_was_killed_goes_on_with_the_next_image() -> None:
    model, x, y = asked()
    arguments = (model, x, y, THREAT, [], [CERTIFIER])
    whole, shelf, told = evaluate(*arguments), Shelf(3), []
    with pytest.raises(KeyboardInterrupt):
        evaluate(*arguments, store=shelf)
    assert [len(rows) for _, rows, _ in shelf.pieces][1:] == [1, 1]
    shelf.most = 1000
    resumed = evaluate(*arguments, store=shelf, on_progress=lambda *news: told.append(news))
    assert sum(len(rows) for _, rows, _ in shelf.pieces) == 16
    columns = [f"{NAME}.{what}" for what in ("status", "success", "verified")]
    assert resumed.table[columns].equals(whole.table[columns])
    lefts = [left for name, _, left in told if name == NAME]
    assert len(lefts) > 1
    assert lefts[-1] == 0


def test_minutes_end_between_two_images(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = asked()
    arguments, shelf = (model, x, y, THREAT, [], [CERTIFIER]), Shelf(1000)

    class Soon(stages.Clock):
        """Up once two pieces are kept."""

        @property
        def up(self) -> bool:
            return len(shelf.pieces) >= 2

    monkeypatch.setattr("holdfast.evaluation.sandwich.Clock", Soon)
    part = evaluate(*arguments, minutes=5, store=shelf)
    assert part.summary["not_reached"] == {NAME: 16 - sum(len(rows) for _, rows, _ in shelf.pieces)}
    assert part.summary["bracket"]["certified"] <= part.summary["bracket"]["attacked"]
    monkeypatch.undo()
    whole = evaluate(*arguments, minutes=5, store=shelf)
    assert "not_reached" not in whole.summary
    assert "undecided" not in whole.table[f"{NAME}.status"].to_list()
    assert making.BLOCK >= 16
