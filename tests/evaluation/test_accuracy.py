"""One definition of each accuracy: table, summary, curve and certified_at agree, and the sandwich holds
everywhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import images, small_cnn
from torch import nn

from holdfast import Threat, evaluate
from holdfast.attacks import Attack
from holdfast.certify import Certifier, Findings, SmoothingCertifier, SoundnessError
from holdfast.evaluation import broken_from, certified, certified_at, sandwich_curve, stands

LINF, L2 = Threat("linf", 0.02), Threat("l2", 0.15)
PGD, FMN = {"name": "pgd", "steps": 10}, {"name": "fmn", "steps": 20}
SMOOTHING = {"name": "smoothing", "sigma": 0.1, "n": 500}


def bounds(method: str, **settings: object) -> dict[str, object]:
    return {"name": "bounds", "method": method, **settings}


@pytest.mark.parametrize(
    ("threat", "attacks", "certifiers"),
    [
        (LINF, ["autoattack"], ["bounds"]),
        (LINF, [PGD, "apgd-t"], [bounds("crown")]),
        (LINF, [PGD], [bounds("alpha-crown", iterations=3), "lipschitz"]),
        (LINF, [FMN, PGD], [bounds("cascade")]),
        (LINF, [], [bounds("cap")]),
        (LINF, ["square"], []),
        (L2, ["autoattack"], ["lipschitz", bounds("crown-ibp")]),
        (L2, [FMN, {"name": "ddn", "steps": 20}], [bounds("lmt")]),
        (Threat("l1", 0.5), [PGD], [bounds("crown")]),
        (LINF.with_eps(0), [PGD, FMN], ["bounds", bounds("crown"), "lipschitz"]),
        (L2, [PGD], [SMOOTHING]),
        (L2, [FMN], [{**SMOOTHING, "mode": "fixed"}, SMOOTHING]),
        (L2, [PGD], [{**SMOOTHING, "tolerance": 0.05}, {"name": "plug-in", "sigma": 0.1, "n": 200}]),
        (L2, [PGD], [{"name": "plug-in", "sigma": 0.1, "n": 200}]),
    ],
    ids=str,
)
def test_table_curve_and_certified_at_agree_and_the_sandwich_holds(
    threat: Threat, attacks: list[Any], certifiers: list[Any]
) -> None:
    model, (x, y) = small_cnn(), images(60)
    with torch.no_grad():
        y = torch.where(torch.arange(60) % 6 > 0, model(x).argmax(1), y)  # mostly right
    attackers = [Attack.parse(attack) for attack in attacks]
    found = evaluate(model, x, y, threat, attackers, certifiers)
    summary, eps = found.summary, threat.eps
    radii = sorted({0.0, eps / 3, 0.9 * eps, eps, 1.1 * eps, 2 * eps})
    curve = sandwich_curve(found.subject, x, y, threat, found, attackers, radii).set_index("eps")

    assert (curve["standard"] == summary["standard"]).all()
    if eps and attacks:
        assert curve["attacked"][eps] == summary["bracket"]["attacked"]
    if eps and summary["bracket"]["certified"] is not None:
        assert curve["certified"][eps] == summary["bracket"]["certified"]
    for name, share in summary["certified"].items():
        at = certified_at(found.table, threat, [0.0, eps])[name]
        assert at[str(threat)] == share == found.table[f"{name}.verified"].mean()
        assert at[str(threat.with_eps(0))] == summary["standard"]
    for side in ("attacked", "certified"):
        line = curve[side].dropna()
        assert (np.diff(line) <= 0).all()
        if len(line):
            assert line[0.0] == summary["standard"]
            assert (line <= summary["standard"]).all()
    both = curve.dropna()
    assert (both["certified"] <= both["attacked"]).all()
    for name, share in summary["attacked"].items():
        assert stands(found.table, eps, eps, name).mean() == share == (~found.table[f"{name}.success"]).mean()


@pytest.mark.parametrize("method", ["crown", "cap", "alpha-crown", "cascade"])
def test_a_line_named_after_a_method_is_that_methods_at_every_radius(method: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 3)]
    model, x = nn.Sequential(nn.Flatten(), *layers), torch.rand(60, 1, 4, 4)
    y, eps, certifier = model(x).argmax(1), 0.04, bounds(method, iterations=3)
    radii = [eps / 2, eps, 1.1 * eps, 1.5 * eps]
    found = evaluate(model, x, y, Threat("linf", eps), certifiers=[certifier], radii=radii)
    curve = sandwich_curve(model, x, y, Threat("linf", eps), found, [], radii)
    shares = certified_at(found.table, Threat("linf", eps), radii)["bounds"]
    assert shares.pop("mean radius") is None  # it was never searched
    direct = [
        evaluate(model, x, y, Threat("linf", r), certifiers=[certifier]).summary["certified"]["bounds"]
        for r in radii
    ]
    assert list(curve["certified"]) == list(shares.values()) == direct
    assert len(set(direct)) > 2
    with pytest.raises(ValueError, match=r"was not asked about radius 0\.05, .* radii=\[...\]"):
        certified_at(found.table, Threat("linf", eps), [0.05])
    partial = certified_at(found.table, Threat("linf", eps), [0.05, *radii], partial=True)["bounds"]
    assert list(partial.values()) == [None, *direct, None]
    in_time = evaluate(model, x, y, Threat("linf", eps), certifiers=[certifier], radii=radii, minutes=10)
    assert in_time.table.equals(found.table)
    searched = evaluate(model, x, y, Threat("linf", eps), certifiers=[{**certifier, "radius_search": "always"}])
    mean = certified_at(searched.table, Threat("linf", eps), [0.05])["bounds"]["mean radius"]
    assert mean is not None
    assert mean > found.table["bounds.radius"].mean()


def hand_made(**columns: object) -> pd.DataFrame:
    return pd.DataFrame({"correct": [True, True, True, False], **columns})


def test_a_success_inside_the_threat_set_counts_from_eps_on_however_its_distance_was_rounded() -> None:
    above = float(np.nextafter(np.float32(0.1), np.float32(1)))
    table = hand_made(**{"a.success": [True, False, True, True], "a.distance": [above, above, 0.05, 0.0]})
    assert broken_from(table, 0.1).tolist() == [0.1, above, 0.05, 0.0]
    assert stands(table, 0.1, 0.1).tolist() == [False, True, False, False]
    assert stands(table, 0.1, 0.0).tolist() == [True, True, True, False]
    table["c.verified"], table["c.radius"] = [False] * 4, [0.0, 0.0, 0.06, 0.0]
    assert broken_from(table, 0.1)[2] == np.nextafter(0.06, 1)  # float32 errs there, the certified network does not
    table["c.verified"], table["c.radius"] = [False, False, True, False], [0.0, 0.0, 0.2, 0.0]
    assert stands(table, 0.1, 0.1).tolist() == [False, True, True, False]  # and counts as right at eps


def test_what_is_wrong_counts_at_no_radius_and_what_was_not_asked_is_refused() -> None:
    columns = {"c.verified": [True, True, False, False], "c.radius": [0.1, 0.1, 0.0, np.inf]}
    table = hand_made(**columns)
    assert certified(table, "c", 0.1).tolist() == [True, True, False, False]
    assert certified(table, "c", 0.0).tolist() == [True, True, True, False]
    table["c.unproven"] = [np.inf, 0.2, 0.1, 0.1]
    assert certified(table, "c", 0.1).sum() == 2
    with pytest.raises(ValueError, match=r"c was not asked about radius 0\.05"):
        certified(table, "c", 0.05)


def test_certificates_that_may_each_be_wrong_say_what_they_are_together() -> None:
    model, (x, y) = small_cnn(), images(20)
    both = [SmoothingCertifier(sigma=0.1, n=200, alpha=0.01), SmoothingCertifier(sigma=0.1, n=300, alpha=0.02)]
    assert evaluate(model, x, y, L2, certifiers=both).summary["bracket_guarantee"] == "probabilistic(0.03)"
    assert evaluate(model, x, y, L2, certifiers=["plug-in"]).summary["bracket_guarantee"] is None
    found = evaluate(model, x, y, L2, certifiers=["bounds", "lipschitz"])
    assert found.summary["bracket_guarantee"] == "deterministic"
    with pytest.raises(ValueError, match="stops as soon as eps is decided"):
        evaluate(model, x, y, L2, certifiers=["smoothing"], radii=[0.1])


@pytest.mark.parametrize("eps", [0.0, 0.3])
@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
def test_a_radius_that_was_searched_coarsely_is_asked_where_it_is_wanted(method: str, eps: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 3))
    x, certifier = torch.rand(80, 1, 4, 4), bounds(method)
    y, threat, radii = model(x).argmax(1), Threat("linf", eps), [0.002, 0.004, 0.01]
    found = evaluate(model, x, y, threat, certifiers=[certifier], radii=radii)
    shares = list(certified_at(found.table, threat, radii)["bounds"].values())[:-1]
    curve = sandwich_curve(model, x, y, threat, evaluate(model, x, y, threat, certifiers=[certifier]), [], radii)
    direct = [
        evaluate(model, x, y, Threat("linf", r), certifiers=[certifier]).summary["certified"]["bounds"]
        for r in radii
    ]
    assert shares == list(curve["certified"]) == direct


class Liar(Certifier):
    """Says yes to whatever is right, at every radius that it is asked about."""

    name = "liar"

    @property
    def finds_radii(self) -> bool:
        return False

    def prover(self, model: nn.Module, x: torch.Tensor, threat: Threat) -> Any:
        return lambda batch: Findings(torch.full((len(batch.x),), threat.eps, dtype=torch.float64))


def test_what_is_certified_beyond_eps_is_watched_over_too() -> None:
    model, (x, y) = small_cnn(), images(30)
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    with pytest.raises(SoundnessError, match=r"certified by liar up to 2 in l2:0\.0001"):
        evaluate(model, x, y, Threat("l2", 1e-4), ["fmn"], [Liar()], radii=[2.0], attack_certified=True)
    found = evaluate(model, x, y, Threat("l2", 1e-4), ["fmn"], [Liar()], attack_certified=True)
    with pytest.raises(SoundnessError, match=r"certified by liar up to 2 in l2:0\.0001, but fmn breaks it"):
        sandwich_curve(model, x, y, Threat("l2", 1e-4), found, [], [0.0, 2.0])
    # Where the image was not kept, the attack finds it again.
    bare = replace(found, adversarial={})
    with pytest.raises(SoundnessError, match="fmn breaks it at") as alarm:
        sandwich_curve(model, x, y, Threat("l2", 1e-4), bare, [Attack.parse("fmn")], [0.0, 2.0])
    rows, x_adv = found.adversarial["fmn"]
    assert torch.allclose(alarm.value.x_adv, x_adv[rows == alarm.value.example][0], atol=1e-6)


def test_what_one_certifier_leaves_open_another_may_know() -> None:
    model, (x, y) = small_cnn(), images(20)
    both = [SmoothingCertifier(sigma=0.1, n=300), SmoothingCertifier(sigma=0.1, n=300, mode="fixed")]
    found = evaluate(model, x, y, L2, certifiers=both)
    curve = sandwich_curve(found.subject, x, y, L2, found, [], [0.0, 0.05, 0.15, 0.2])
    assert curve["certified"].notna().all()
    assert (np.diff(curve["certified"]) <= 0).all()
    evaluate(model, x, y, L2, certifiers=["smoothing"], radii=[0.0, L2.eps])  # it answers those
    with pytest.raises(ValueError, match="needs radii"):
        sandwich_curve(found.subject, x, y, L2, found, [], [])


def test_attacks_that_did_not_run_at_a_radius_say_nothing_of_it() -> None:
    model, (x, y) = small_cnn(), images(20)
    found = evaluate(model, x, y, LINF, [PGD])
    curve = sandwich_curve(model, x, y, LINF, found, [], [0.0, 0.01, 0.02, 0.03]).set_index("eps")["attacked"]
    assert curve.notna().tolist() == [True, False, True, False]
    assert curve[0.02] == found.summary["bracket"]["attacked"]
