"""Neural collapse against the original's numbers, other packages', a perfect simplex, and itself in pieces."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from holdfast.analysis import CollapseMeter, NeuralCollapse, compare_simplices, neural_collapse

SETS = ("balanced", "imbalanced", "collapsed")
Arrays = Callable[[str], dict[str, Tensor]]


def inputs(arrays: dict[str, Tensor], kind: str = "clean") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    features = arrays["in_features" if kind == "clean" else "in_features_perturbed"]
    return features, arrays["in_labels"], arrays["in_weight"], arrays["in_bias"]


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("kind", ["clean", "robust"])
def test_the_original_metrics(name: str, kind: str, reference: Arrays) -> None:
    arrays = reference(f"nc_metrics_{name}")
    found = neural_collapse(*inputs(arrays, kind), scale="raw")
    theirs = {
        "nc1": found.nc1,
        "nc2_norm_M": found.nc2_norm_means,
        "nc2_norm_W": found.nc2_norm_weights,
        "nc2_angle_M": found.nc2_angle_means,
        "nc2_angle_W": found.nc2_angle_weights,
        "nc3": found.nc3,
        "nc4": found.nc4,
    }
    for key, value in theirs.items():
        assert value == pytest.approx(arrays[f"f64_{kind}_{key}"].item(), rel=1e-9, abs=1e-12)
    assert torch.allclose(found.class_means.T, arrays[f"f64_{kind}_M"], rtol=1e-12)


@pytest.mark.parametrize("name", SETS)
def test_what_other_packages_call_the_same(name: str, reference: Arrays) -> None:
    arrays = reference(f"nc_metrics_{name}")
    found = neural_collapse(*inputs(arrays), centre="class")
    weighted = neural_collapse(*inputs(arrays))
    theirs = {
        "rh_nc1_pinv": found.nc1,
        "rh_nc1_svd": found.nc1_svd,
        "rh_nc1_quot": found.nc1_quotient,
        "rh_nc1_cdnv": found.cdnv,
        "rh_nc2_etf_err": found.etf_error_means,
        "gl_nc2_w": found.etf_error_weights,
        "rh_nc3_dual_err": found.dual_etf_error,
        "rh_nc3u_uni_dual_cos": found.duality_variance,
        "rh_nc2g_log_var": found.uniformity_log,
        "kw_bias_collapse": weighted.bias_collapse,
        "gl_ncc_mismatch": found.nc4,
    }
    for key, value in theirs.items():
        if f"f64_clean_{key}" in arrays:
            assert value == pytest.approx(arrays[f"f64_clean_{key}"].item(), rel=1e-8, abs=1e-12)
    assert torch.allclose(found.nc3_classes, arrays["f64_clean_rh_nc3_distance_norms"])
    spread = arrays["f64_clean_rh_nc2g_dist_var"].sqrt() / arrays["f64_clean_rh_nc2g_dist_mean"]
    assert found.uniformity_distance == pytest.approx(spread.item(), rel=1e-8)


@pytest.mark.parametrize("name", SETS)
def test_between_clean_and_perturbed(name: str, reference: Arrays) -> None:
    arrays = reference(f"nc_metrics_{name}")
    (clean, y, weight, bias), (perturbed, *_) = inputs(arrays), inputs(arrays, "robust")
    for key, x, means in (("reverse", perturbed, clean), ("perturb", clean, perturbed)):
        found = neural_collapse(x, y, weight, bias, scale="raw", means_of=(means, y))
        assert found.nc1 == pytest.approx(arrays[f"f64_{key}_nc1"].item(), rel=1e-9)
        assert found.nc4 == pytest.approx(arrays[f"f64_{key}_nc4"].item(), abs=1e-12)
    means = neural_collapse(clean, y, weight).class_means
    compared = compare_simplices(means, neural_collapse(perturbed, y, weight).class_means)
    assert torch.allclose(compared.distance, arrays["f64_sim_dist"])
    assert torch.allclose(compared.angle, arrays["f64_sim_angle"], atol=1e-8)
    assert torch.allclose(compared.distance_uncentred, arrays["f64_sim_dist_abs"])
    assert torch.allclose(compared.angle_uncentred, arrays["f64_sim_angle_abs"], atol=1e-8)
    assert compared.global_distance == pytest.approx(arrays["f64_sim_muG_dist"].item())
    assert compared.global_angle == pytest.approx(arrays["f64_sim_muG_angle"].item(), abs=1e-8)
    same = compare_simplices(means.float(), means.float())
    assert (same.angle == 0).all()  # where the original's arc cosine gives NaN


def simplex(classes: int, each: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Features on the vertices of a simplex, and a classifier that mirrors them."""
    vertices = torch.eye(classes, dtype=torch.float64) - 1 / classes
    labels = torch.arange(classes).repeat(each)
    return vertices[labels] + 3.0, labels, 2.5 * vertices


def test_a_perfect_simplex_and_random_features() -> None:
    x, y, weight = simplex(7)
    found = neural_collapse(x, y, weight, num_classes=7)
    zero = {name: value for name, value in found.scalars.items() if name not in ("ncc_accuracy", "bias_collapse")}
    assert zero == pytest.approx(dict.fromkeys(zero, 0.0), abs=1e-9)
    assert found.ncc_accuracy == 1
    random = torch.randn(300, 20, generator=torch.Generator().manual_seed(0))
    far = neural_collapse(random, torch.arange(300) % 7, torch.randn(7, 20))
    assert far.nc1 > 1
    assert far.nc2_angle_means > 0.02
    assert far.nc3 > 0.5
    assert far.nc4 > 0.3


def counted(batches: list[tuple[Tensor, Tensor]], classes: int) -> CollapseMeter:
    meter = CollapseMeter(classes)
    for x, y in batches:
        meter.update(x, y)
    return meter


def same(a: NeuralCollapse, b: NeuralCollapse) -> None:
    first, second = a.scalars, b.scalars
    for name in first:
        if name not in ("nc4", "ncc_accuracy"):  # these want a second look
            assert first[name] == pytest.approx(second[name], rel=1e-10, abs=1e-10, nan_ok=True), name
    assert torch.allclose(a.class_means, b.class_means, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert torch.equal(a.counts, b.counts)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    cuts=st.lists(st.integers(0, 60), max_size=5),
    classes=st.integers(2, 12),
    width=st.integers(1, 9),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
)
def test_any_split_in_any_order_gives_the_same(
    seed: int, cuts: list[int], classes: int, width: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(60, width, generator=generator, dtype=torch.float64)
    y = torch.randint(0, classes, (60,), generator=generator)
    weight = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    whole = neural_collapse(x, y, weight)
    ends = [0, *sorted(cuts), 60]
    parts = [(x[a:b], y[a:b]) for a, b in pairwise(ends)]
    order = torch.randperm(len(parts), generator=generator).tolist()
    same(counted([parts[i] for i in order], classes).compute(weight), whole)
    merged = CollapseMeter(classes)
    for i in order:
        merged.merge(counted([parts[i]], classes))
    for part in parts:
        merged.revisit(*part, weight)
    found = merged.compute(weight)
    same(found, whole)
    assert found.nc4 == pytest.approx(whole.nc4)
    assert found.ncc_accuracy == pytest.approx(whole.ncc_accuracy)


def test_two_processes_count_the_same(reference: Arrays) -> None:
    arrays = reference("nc_metrics_imbalanced")
    x, y, weight, bias = inputs(arrays)
    halves = [[(x[i::2], y[i::2])] for i in range(2)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        first, second = pool.map(counted, halves, [5, 5])
    first.merge(second)
    same(first.compute(weight, bias), neural_collapse(x, y, weight, bias))


def test_absent_and_single_classes_and_more_classes_than_features() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 4, generator=generator), torch.randint(0, 6, (50,), generator=generator)
    y[y == 3] = 2
    y[0], y[1:][y[1:] == 5] = 5, 4  # one example of class 5, none of class 3
    weight = torch.randn(6, 4, generator=generator)
    found = neural_collapse(x, y, weight)
    assert found.absent == (3,)
    assert found.class_means[3].isnan().all()
    assert found.nc3_classes[3].isnan()
    assert found.counts[5] == 1
    kept = torch.tensor([0, 1, 2, 4, 5])
    relabelled = neural_collapse(x, torch.searchsorted(kept, y), weight[kept])
    same_names = [name for name in found.scalars if name != "nc4"]
    assert {n: found.scalars[n] for n in same_names} == pytest.approx(
        {n: relabelled.scalars[n] for n in same_names}
    )
    assert neural_collapse(torch.randn(40, 3), torch.arange(40) % 10).nc1 > 0
    alone = neural_collapse(x, torch.zeros(50, dtype=torch.int64), weight)
    assert math.isnan(alone.nc1)
    assert alone.ncc_accuracy == 1


def test_a_second_look_is_merged_and_forgotten_when_the_means_move() -> None:
    torch.manual_seed(0)
    x, y, weight = torch.randn(80, 8), torch.arange(80) % 4, torch.randn(4, 8)
    expected = neural_collapse(x, y, weight)
    parts = [CollapseMeter(4), CollapseMeter(4)]
    for meter, half in zip(parts, (slice(0, 40), slice(40, 80)), strict=True):
        meter.update(x[half], y[half])
    whole = [CollapseMeter(4), CollapseMeter(4)]
    for meter, half in zip(whole, (slice(0, 40), slice(40, 80)), strict=True):
        for part in parts:
            meter.merge(part)
        meter.revisit(x[half], y[half], weight)
    whole[0].merge_revisits(whole[1])
    found = whole[0].compute(weight)
    assert (found.nc4, found.ncc_accuracy) == (expected.nc4, expected.ncc_accuracy)
    whole[0].update(x[:5], y[:5])
    assert math.isnan(whole[0].compute(weight).nc4)
    whole[1].revisit(x, y)
    assert math.isnan(parts[0].compute(weight).nc4)
    with pytest.raises(ValueError, match="different means"):
        whole[0].merge_revisits(parts[0])
    with pytest.raises(ValueError, match="nothing was counted"):
        CollapseMeter(4).revisit(x, y)


def test_examples_of_a_class_without_a_mean_count_nowhere() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(60, 6).double(), torch.arange(60) % 3
    others, labels = torch.randn(50, 6).double(), torch.arange(50) % 5
    known = labels < 3
    found = neural_collapse(others, labels, num_classes=5, means_of=(x, y))
    expected = neural_collapse(others[known], labels[known], num_classes=5, means_of=(x, y))
    assert (found.nc1, found.cdnv, found.ncc_accuracy) == (expected.nc1, expected.cdnv, expected.ncc_accuracy)


def test_half_precision_features_agree_with_their_own_logits_in_full() -> None:
    torch.manual_seed(0)
    x, y, weight = torch.randn(80, 8).half(), torch.arange(80) % 4, 1e4 * torch.randn(4, 8)
    assert neural_collapse(x, y, weight).nc4 == neural_collapse(x.double(), y, weight.double()).nc4


def test_bad_input_names_the_batch() -> None:
    x, y = torch.randn(8, 3), torch.arange(8) % 2
    meter = CollapseMeter(2)
    meter.update(x, y)
    broken = x.clone()
    broken[5, 1] = math.nan
    for features, labels, words in (
        (broken, y, "batch 2: the features of example 5"),
        (x, y + 1, r"batch 2: labels are integers in 0\.\.1, given 1 to 2"),
        (x[:, :2], y, "batch 2: 2 features after 3"),
        (x, y[:4], "batch 2: expected features"),
    ):
        with pytest.raises(ValueError, match=words):
            meter.update(features, labels)
    with pytest.raises(ValueError, match="classes"):
        meter.merge(CollapseMeter(3))
    with pytest.raises(ValueError, match="nothing was counted"):
        CollapseMeter(3).compute()
    for options in ({"centre": "middle"}, {"scale": "big"}):
        with pytest.raises(ValueError, match="expected the"):
            neural_collapse(x, y, **options)
    with pytest.raises(ValueError, match="expected a weight"):
        neural_collapse(x, y, torch.randn(2, 4))
    with pytest.raises(ValueError, match="no examples"):
        neural_collapse(x[:0], y[:0])
