"""Randomised smoothing on classifiers whose probabilities are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import Trace, images, small_cnn
from scipy import special
from torch import Tensor, nn

from holdfast import Threat, evaluate
from holdfast.attacks import DDN, PGD
from holdfast.certify import Certifier, PlugInSmoothing, SmoothedClassifier, SmoothingCertifier
from holdfast.certify.smoothing import plug_in_radius
from holdfast.evaluation import sandwich_curve
from holdfast.experiments.recipes.overrides import resolve

L2 = Threat("l2", 0.1)


class HalfSpace(nn.Module):
    """Class 1 where the first pixel exceeds ½: smoothed by Gaussian noise it is the same, and its radius is the
    distance; by uniform noise of half-width w, too, as long as that is less than w."""

    def forward(self, x: Tensor) -> Tensor:
        first = x.flatten(1)[:, 0] - 0.5
        return torch.stack([-first, first], 1)


def at(*distances: float) -> tuple[Tensor, Tensor]:
    """Images so far on the right side of the boundary."""
    x = torch.full((len(distances), 1, 2, 2), 0.5)
    x[:, 0, 0, 0] += torch.tensor(distances)
    return x, torch.ones(len(distances), dtype=torch.int64)


@pytest.mark.parametrize("settings", [{"mode": "fixed", "n": 20_000}, {"tolerance": 0.01, "n": 50_000}])
def test_the_radius_of_a_half_space_from_below(settings: dict) -> None:
    x, y = at(0.05, 0.15, 0.3, 0.45)
    certificate = SmoothingCertifier(sigma=0.25, **settings)(HalfSpace(), x, y, L2)
    exact = torch.tensor([0.05, 0.15, 0.3, 0.45], dtype=torch.float64)
    assert (certificate.radius <= exact).all()
    assert (certificate.radius >= exact - 0.02).all()
    assert certificate.status == ["undecided", "verified", "verified", "verified"]
    assert certificate.guarantee == "probabilistic(0.001)"
    assert (certificate.samples > 100).all()


def test_uniform_noise_in_l1() -> None:
    x, y = at(0.05, 0.15, 0.3)
    certifier = SmoothingCertifier(sigma=0.25, noise="uniform", mode="fixed", n=20_000)
    certificate = certifier(HalfSpace(), x, y, Threat("l1", 0.1))
    exact = torch.tensor([0.05, 0.15, 0.3], dtype=torch.float64)
    assert (certificate.radius <= exact).all()
    assert (certificate.radius >= exact - 0.02).all()


@pytest.mark.parametrize("mode", ["fixed", "sequential"])
def test_false_certificates_are_as_rare_as_promised(mode: str) -> None:
    """A thousand images at a distance just below eps; each certificate for them is false."""
    x, y = at(*[0.0995] * 1000)
    certifier = SmoothingCertifier(sigma=0.25, alpha=0.05, mode=mode, n=300, n0=20)
    certificate = certifier(HalfSpace(), x, y, L2, batch_size=8192)
    false = certificate.verified.double().mean().item()
    assert false <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)
    assert (certificate.radius > 0.0995).double().mean() <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)


def test_abstention_and_wrong_classes() -> None:
    x, y = at(0.0, -0.3, 0.3)
    certificate = SmoothingCertifier(sigma=0.25, mode="fixed", n=1000)(HalfSpace(), x, y, L2)
    assert certificate.status == ["undecided", "wrong", "verified"]
    assert certificate.abstained.tolist() == [True, False, False]
    assert certificate.radius[:2].tolist() == [0, 0]


@pytest.mark.parametrize("mode", ["fixed", "sequential"])
def test_the_answer_depends_on_the_example_alone(mode: str) -> None:
    model, (x, y) = small_cnn().train(), images(12)
    trace = Trace(model)
    certifier = SmoothingCertifier(sigma=0.1, n=1000, n0=30, mode=mode)
    whole = certifier(model, x, y, Threat("l2", 0.02), batch_size=2048)
    trace.check()
    packed = certifier(model, x, y, Threat("l2", 0.02), batch_size=64)
    for name in ("prediction", "verified", "radius", "samples", "abstained"):
        assert torch.equal(getattr(whole, name), getattr(packed, name))
    other = certifier(model, x, y, Threat("l2", 0.02), seed=1)
    drawn = "radius" if mode == "fixed" else "samples"
    assert not torch.equal(getattr(other, drawn), getattr(whole, drawn))
    assert certifier(model, x[:0], y[:0], Threat("l2", 0.02)).status == []


def test_sequential_sampling_spends_little_where_it_is_clear() -> None:
    x, y = at(0.4, 0.101, -0.4)
    certifier = SmoothingCertifier(sigma=0.25, n=5000)
    certificate = certifier(HalfSpace(), x, y, L2)
    assert certificate.samples[0] <= 100 + 128
    assert certificate.samples[1] == 100 + 5000
    assert certificate.verified.tolist() == [True, False, False]
    seen: list[tuple[int, int]] = []
    certifier(HalfSpace(), x, y, L2, on_progress=lambda left, spent: seen.append((left, spent)))
    assert seen[-1][0] == 0
    assert [spent for _, spent in seen] == sorted(spent for _, spent in seen)


def test_hopeless_settings_are_refused_with_the_arithmetic() -> None:
    x, y = at(0.3)
    with pytest.raises(ValueError, match=r"0.001\^\(1/9\) = 0.464"):
        SmoothingCertifier(n=9, mode="fixed")(HalfSpace(), x, y, Threat("l2", 0.0))
    with pytest.raises(ValueError, match="never certify l2:2"):
        SmoothingCertifier(n=1000)(HalfSpace(), x, y, Threat("l2", 2.0))
    with pytest.raises(ValueError, match="noise=uniform is for l1"):
        SmoothingCertifier()(HalfSpace(), x, y, Threat("l1", 0.1))
    with pytest.raises(ValueError, match="linf"):
        SmoothingCertifier()(HalfSpace(), x, y, Threat("linf", 0.1))
    with pytest.raises(ValueError, match="tolerance"):
        SmoothingCertifier(tolerance=0.1, mode="fixed")


def test_labels_must_fit_the_network() -> None:
    x, _ = at(0.1, 0.2)
    for certifier in (SmoothingCertifier(), PlugInSmoothing()):
        with pytest.raises(ValueError, match="label 5"):
            certifier(HalfSpace(), x, torch.tensor([1, 5]), L2)


def test_on_the_grid_sums_are_exact_and_radii_smaller() -> None:
    x, y = at(0.2, 0.3)
    plain = SmoothingCertifier(sigma=0.25, mode="fixed", n=5000, grid_bits=None)
    fine = plain.model_copy(update={"grid_bits": 12})
    seen: list[Tensor] = []

    class Spy(HalfSpace):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return super().forward(x)

    radius = fine(Spy(), x, y, L2).radius
    assert all(torch.equal(part * 2**12, (part * 2**12).round()) for part in seen)
    draw = fine.noise_model.draw(x[0], 7)
    assert torch.equal(draw, fine.noise_model.on_grid(plain.noise_model.draw(x[0], 7)))
    points = x.clone().requires_grad_(True)
    smoothed = fine.subject(HalfSpace())
    assert torch.autograd.grad(smoothed(points)[:, 1].sum(), points)[0][:, 0, 0, 0].abs().min() > 0
    assert (radius <= torch.tensor([0.2, 0.3])).all()
    gap = plain(HalfSpace(), x, y, L2).radius - radius
    assert (gap > -0.01).all()
    assert fine.noise_model.radius(0.9, 4) == pytest.approx(plain.noise_model.radius(0.9, 4) - 2 * 2.0**-12)


def test_plug_in_radii(reference: Callable[[str], dict[str, Tensor]]) -> None:
    arrays = reference("intriguing_smoothing")
    counts = arrays["counts"]
    for column, sigma in enumerate(arrays["sigmas"].tolist()):
        for label in range(4):
            y = torch.full((len(counts),), label)
            found = plug_in_radius(counts, y, sigma)
            assert torch.allclose(found, arrays["repo_radius"][:, column, label].double(), rtol=0, atol=1e-9)
    certificate = PlugInSmoothing(sigma=0.25)(HalfSpace(), *at(0.1, 5.0), Threat("l2", 0.05, 0.0, 9.0))
    assert certificate.guarantee == "estimate"
    assert certificate.radius[0] == pytest.approx(0.1, abs=0.03)
    assert certificate.radius[1] == pytest.approx(0.25 * special.ndtri(0.99))  # clipped


def test_the_smoothed_classifier_predicts_certifies_and_is_attacked() -> None:
    x, y = at(0.0, 0.02, 0.3, -0.3)
    certifier = SmoothingCertifier(sigma=0.1)
    smoothed = SmoothedClassifier(HalfSpace(), certifier, certifier.noise_model)
    assert smoothed.predict(x).tolist() == [-1, 1, 1, 0]
    assert smoothed.certify(x, y, L2).status == ["undecided", "undecided", "verified", "wrong"]
    points = x.clone().requires_grad_(True)
    gradient = torch.autograd.grad(smoothed(points)[:, 1].sum(), points)[0]
    assert (gradient[:, 0, 0, 0] > 0).all()
    assert torch.equal(smoothed(x)[1:2], smoothed(x[1:2]))


@pytest.mark.parametrize("label", [0, 1])
def test_the_sandwich_of_a_smoothed_network(label: int) -> None:
    """For both classes: the few votes that an attack sees favour one of them."""
    distances = np.linspace(-0.1, 0.4, 40)
    x, _ = at(*(distances if label else -distances).tolist())
    y = torch.full((40,), label)
    certifiers = [SmoothingCertifier(sigma=0.1)]
    evaluation = evaluate(HalfSpace(), x, y, L2, [PGD(steps=10), DDN(steps=10)], certifiers)
    assert isinstance(evaluation.subject, SmoothedClassifier)
    table, summary = evaluation.table, evaluation.summary
    right, robust = distances > 0, distances > 0.1
    assert (table["correct"] <= right).all()
    assert (table["correct"] >= (distances > 0.02)).all()  # nearer a hundred votes may choose the other class
    assert (table["not_surely_wrong"] >= right).all()
    assert (table["not_surely_wrong"] <= (distances > -0.02)).all()
    assert (table["smoothing.verified"] <= robust).all()
    for attack in ("pgd", "ddn"):
        assert not (table["smoothing.verified"] & table[f"{attack}.success"]).any()
        assert (table[f"{attack}.success"] <= ~robust).all()
    assert (table["pgd.success"] >= (distances < 0.06)).all()
    assert summary["certified"]["smoothing"] <= robust.mean() <= summary["attacked"]["pgd"] <= summary["standard"]
    sampling = summary["sampling"]["smoothing"]
    assert sampling["samples"] > 100
    assert (sampling["sigma"], sampling["n"], sampling["alpha"]) == (0.1, 100_000, 0.001)
    assert sampling["abstained"] < 0.1  # 100,000 votes tell nearly all of these from a coin
    with pytest.raises(ValueError, match="different classifiers"):
        evaluate(HalfSpace(), x, y, L2, [], [*certifiers, "bounds"])


def test_the_curve_of_a_smoothed_network_stays_above_the_truth() -> None:
    distances = np.linspace(0, 0.3, 30)
    x, _ = at(*(-distances).tolist())
    y = torch.zeros(30, dtype=torch.int64)
    evaluation = evaluate(HalfSpace(), x, y, L2, [PGD(steps=10)], [SmoothingCertifier(sigma=0.1)])
    radii = [0.0, 0.1, 0.2]
    curve = sandwich_curve(evaluation.subject, x, y, L2, evaluation, [PGD(steps=10)], radii)
    truth = [(distances > radius).mean() for radius in radii]
    unsure = (~evaluation.table["correct"].to_numpy()[1:]).mean()
    assert unsure < 0.05
    assert (curve["attacked"] >= np.array(truth) - unsure - 1e-9).all()
    assert curve["attacked"][0] == curve["certified"][0] == evaluation.summary["standard"]
    assert curve["certified"][1] == evaluation.summary["certified"]["smoothing"]
    assert np.isnan(curve["certified"][2])  # sequential sampling knows its own eps only
    assert (curve["attacked"] <= np.array(truth) + 0.2).all()


def test_kept_pieces_of_one_classifier_are_not_another_s() -> None:
    class Shelf(dict):
        def kept(self, stage: str) -> list[object]:
            return self.get(stage, [])

        def put(self, stage: str, rows: Tensor, found: object) -> None:
            self.setdefault(stage, []).append((rows, found))

    x, y = at(*np.linspace(0.01, 0.3, 20).tolist())
    shelf = Shelf()
    evaluate(HalfSpace(), x, y, L2, [PGD(steps=5)], [], store=shelf)
    for sigma in (0.05, 0.25):
        evaluate(HalfSpace(), x, y, L2, [PGD(steps=5)], [SmoothingCertifier(sigma=sigma)], store=shelf)
    assert sorted(stage.partition("-")[0] for stage in shelf) == ["pgd"] * 3 + ["smoothing"] * 2


def test_radii_need_a_certifier_that_finds_them() -> None:
    with pytest.raises(ValueError, match="tolerance"):
        resolve("mnist-smoothing", ["evaluation.radii=[36/255]"])
    resolve(
        "mnist-smoothing",
        ["evaluation.radii=[36/255]", "evaluation.certifiers=[{name: smoothing, tolerance: 1/50}]"],
    )


def test_to_give_up_on_eps_is_no_abstention() -> None:
    """Classes that win with a probability far from a coin's, none of them certified at eps."""
    x, y = at(*np.linspace(0.03, 0.09, 40), -0.05)
    found = {
        mode: SmoothingCertifier(sigma=0.25, n0=2000, n=20_000, mode=mode)(HalfSpace(), x, y, L2)
        for mode in ("fixed", "sequential")
    }
    for certificate in found.values():
        assert not certificate.abstained.any()
        assert not certificate.verified.any()
        assert certificate.status == ["undecided"] * 40 + ["wrong"]
    assert found["sequential"].samples.sum() < 0.6 * found["fixed"].samples.sum()


def test_the_standard_accuracy_of_a_vote_is_what_it_is_sure_of() -> None:
    x, _ = at(*[0.0] * 20, *[0.3] * 20, *[-0.3] * 10)
    y = (torch.arange(50) % 2).where(torch.arange(50) < 20, 1)
    for certifier in (SmoothingCertifier(sigma=0.25, n=2000), PlugInSmoothing(sigma=0.25, n=400)):
        found = evaluate(HalfSpace(), x, y, L2, ["fgsm"], [certifier])
        summary, table = found.summary, found.table
        assert table["correct"][20:].tolist() == [True] * 20 + [False] * 10
        assert summary["attacked"]["fgsm"] <= summary["standard"] <= summary["not_surely_wrong"] == 40 / 50
        if certifier.name == "smoothing":
            assert summary["standard"] == 20 / 50
            assert (table["prediction"][:20] == -1).all()
            # What an abstention is worth to an attack does not matter: it is wrong before.
            assert not table["fgsm.attacked"][:20].any()
        else:
            assert 20 / 50 < summary["standard"] < 40 / 50


class Coin(HalfSpace):
    """Every image at a distance of nothing: under Gaussian noise, class 1 with probability ½."""


@pytest.mark.parametrize("mode", ["fixed", "sequential"])
def test_a_vote_that_abstains_everywhere_is_evaluated(mode: str) -> None:
    x, y = at(*[0.0] * 5)
    for rows in (slice(None), slice(1)):
        summary = evaluate(
            Coin(), x[rows], y[rows], L2, ["fgsm"], [SmoothingCertifier(sigma=0.25, n=1000, mode=mode)]
        ).summary
        assert (summary["standard"], summary["attacked"]["fgsm"], summary["not_surely_wrong"]) == (0, 0, 1)


def test_a_radius_known_well_enough_is_no_abstention() -> None:
    """A wide tolerance is met before it is known whether the class wins."""
    x, y = at(*[0.0632] * 20)  # probability 0.6
    for tolerance in (0.25, 0.1, 0.02):
        certifier = SmoothingCertifier(sigma=0.25, n0=2000, n=20_000, tolerance=tolerance)
        certificate = certifier(HalfSpace(), x, y, Threat("l2", 0.05))
        assert not certificate.abstained.any()
        assert (certificate.radius <= 0.0632).all()


@pytest.mark.parametrize("mode", ["fixed", "sequential"])
def test_rounding_to_a_grid_shrinks_radii_and_makes_nobody_abstain(mode: str) -> None:
    x, y = at(*[0.0632] * 10)
    x = x.repeat(1, 1, 8, 8)  # 256 dimensions: radii shrink by 1/16
    certifier = SmoothingCertifier(sigma=0.25, n0=2000, n=3000, mode=mode, grid_bits=8)
    certificate = certifier(HalfSpace(), x, y, Threat("l2", 0.01))
    assert not certificate.abstained.any()
    assert not certificate.verified.any()


def test_an_estimate_beside_a_certificate_changes_no_standard_accuracy() -> None:
    x, y = at(*[0.0] * 8, 0.3)
    certifier, estimate = SmoothingCertifier(sigma=0.25, n=2000), PlugInSmoothing(sigma=0.25, n=200)
    alone, both = (evaluate(HalfSpace(), x, y, L2, [], parts) for parts in ([certifier], [certifier, estimate]))
    assert alone.summary["standard"] == both.summary["standard"] == 1 / 9
    assert both.summary["certified"]["plug-in"] <= both.summary["standard"]


class Cliff(HalfSpace):
    """NaN where the first pixel exceeds 1."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).where(x.flatten(1)[:, :1] < 1, torch.nan)


@pytest.mark.parametrize(
    "certifier",
    [
        SmoothingCertifier(sigma=0.05, n=1000),
        SmoothingCertifier(sigma=0.05, n=1000, mode="fixed"),
        PlugInSmoothing(sigma=0.05, n=1000),
    ],
    ids=["sequential", "fixed", "plug-in"],
)
def test_nan_on_a_noisy_copy_is_the_error_of_its_example_alone(certifier: Certifier) -> None:
    x, y = at(0.15, 0.45, 0.2, -0.2)
    threat = Threat("l2", 0.02)
    certificate = certifier(Cliff(), x, y, threat)
    assert certificate.status == ["verified", "error", "verified", "wrong"]
    assert certificate.radius[1] == 0
    for batch_size in (64, 128, 4096):
        assert torch.equal(certifier(Cliff(), x, y, threat, batch_size=batch_size).radius, certificate.radius)
    assert certifier(Cliff(), x[[0, 2, 3]], y[[0, 2, 3]], threat).status == ["verified", "verified", "wrong"]
    table = evaluate(Cliff(), x, y, threat, [], [certifier]).table
    assert table["correct"].tolist() == [True, False, True, False]


def test_a_grid_finer_than_the_sums_is_refused() -> None:
    x, y = at(0.3)
    with pytest.raises(ValueError, match="grid_bits of at most 18"):
        SmoothingCertifier(sigma=5, n=1000)(HalfSpace(), x, y, L2)
    SmoothingCertifier(sigma=5, n=1000, grid_bits=18)(HalfSpace(), x, y, L2)
    SmoothingCertifier(sigma=5, n=1000)(HalfSpace(), x.double(), y, L2)
