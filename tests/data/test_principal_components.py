"""Principal components against the original, and the data set projected on some of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from holdfast.data import PrincipalComponents, load_data, parse_indices


@pytest.mark.parametrize(
    ("name", "ranges"),
    [("head4", "0:4"), ("head16", "0:16"), ("tail", "8:24"), ("mix", "0:3,12:24"), ("all", "0:24"), ("none", None)],
)
def test_reconstructions_equal_the_original(
    reference: Callable[[str], dict[str, Tensor]], name: str, ranges: str | None
) -> None:
    arrays = reference("intriguing_pca")
    fitted = PrincipalComponents.fit(arrays["X"])
    indices = parse_indices(ranges) if ranges else []
    assert torch.allclose(fitted.mean, arrays["mean"].float(), atol=1e-6)
    assert torch.allclose(fitted.singular_values, arrays["singular_values"].float(), atol=1e-5)
    new = fitted.project(arrays["new_x"], indices)
    assert torch.allclose(new, arrays[f"rec_{name}_new"].float(), atol=1e-5)
    old = fitted.project(arrays["X"][:1], indices)[0]
    assert torch.allclose(old, arrays[f"rec_{name}_train0"].float(), atol=1e-5)


@pytest.mark.parametrize("count", [5, 24, 40])
def test_directions_are_orthonormal_and_as_many_as_there_can_be(
    reference: Callable[[str], dict[str, Tensor]], count: int
) -> None:
    images = reference("intriguing_pca")["X"][:count]
    fitted = PrincipalComponents.fit(images)
    size = min(count, 24)
    assert fitted.directions.shape == (24, size)
    assert torch.allclose(fitted.directions.T @ fitted.directions, torch.eye(size), atol=1e-5)
    assert (fitted.singular_values.diff() <= 1e-5).all()
    assert torch.allclose(fitted.project(images, list(range(size))), images, atol=1e-5)
    with pytest.raises(IndexError, match=f"component 24 was asked for, but there are {size}"):
        fitted.project(images, [24])


def test_ranges() -> None:
    assert parse_indices("0:3, 5,7:9") == [0, 1, 2, 5, 7, 8]
    for wrong in ("", "a", "3:1", "2:2", "-1:3", "0:4,2:6", "1:2:3"):
        with pytest.raises(ValueError, match="range"):
            parse_indices(wrong)


def test_the_basis_is_kept_and_a_damaged_one_is_made_anew(tmp_path: Path) -> None:
    images = torch.rand(30, 1, 4, 4)
    first = PrincipalComponents.fit_cached(images, tmp_path)
    (path,) = tmp_path.iterdir()
    assert torch.equal(PrincipalComponents.fit_cached(images, tmp_path).directions, first.directions)
    path.write_bytes(b"damaged")
    assert torch.equal(PrincipalComponents.fit_cached(images, tmp_path).directions, first.directions)
    PrincipalComponents.fit_cached(images + 1, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    reshaped = PrincipalComponents.fit_cached(images.view(15, 2, 4, 4), tmp_path)  # the same bytes
    assert reshaped.mean.shape == (32,)


def test_a_data_set_on_chosen_components(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path))
    plain, some = load_data("digits"), load_data("digits", components="0:8")
    x, y = some.test.batch(slice(None))
    assert x.dtype == torch.float32
    assert torch.equal(y, plain.test.labels)
    original = plain.test.batch(slice(None))[0]
    assert 0.001 < (x - original).pow(2).mean() < original.var()
    assert torch.linalg.matrix_rank(x.flatten(1) - x.flatten(1).mean(0), atol=1e-3) == 8
    with pytest.raises(IndexError, match="there are 20"):
        load_data("digits", components="30:40", train_size=20)


def test_where_nobody_has_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("HOLDFAST_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    images = torch.rand(10, 1, 4, 4)
    assert torch.equal(PrincipalComponents.fit_cached(images).mean, PrincipalComponents.fit(images).mean)
