"""Separation against the original distances and against all pairs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from holdfast.analysis import separation

NORMS = {"linf": "inf", "l2": "l2", "l1": "l1"}


@pytest.mark.parametrize("norm", NORMS)
def test_the_original_distances(norm: str, reference: Callable[[str], dict[str, Tensor]]) -> None:
    arrays = reference("lolip_separation")
    x, y = arrays["train_x"], arrays["train_y"].long()
    inside = separation(x, y, norm)
    assert torch.allclose(inside.distance, arrays[f"{NORMS[norm]}_train_train"], rtol=0, atol=1e-9)
    other = separation(x, y, norm, queries=arrays["test_x"], query_labels=arrays["test_y"].long())
    assert torch.allclose(other.distance, arrays[f"{NORMS[norm]}_test_train"], rtol=0, atol=1e-9)
    assert (inside.distance[3], inside.neighbour[3]) == (0, 7)  # the same image with two labels


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
def test_all_pairs(norm: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(150, 3, 11, 11, generator=generator)
    x = (255 * x).round().to(dtype) if dtype == torch.uint8 else x.to(dtype)
    y = torch.randint(0, 4, (150,), generator=generator)
    found = separation(x, y, norm, memory=20_000)
    flat = (x.float() / 255 if dtype == torch.uint8 else x).flatten(1)
    order = {"linf": float("inf"), "l2": 2, "l1": 1}[norm]
    pairs = torch.cdist(flat, flat, order, compute_mode="donot_use_mm_for_euclid_dist")
    pairs[y[:, None] == y[None]] = torch.inf
    assert torch.allclose(found.distance, pairs.amin(1), rtol=1e-6)
    chosen = pairs.gather(1, found.neighbour[:, None])[:, 0]
    assert torch.allclose(chosen, pairs.amin(1), rtol=1e-6)
    assert (y[found.neighbour] != y).all()


def test_ties_one_class_and_nonsense() -> None:
    x, y = torch.tensor([[0.0], [1.0], [-1.0], [1.0]]), torch.tensor([0, 1, 1, 1])
    assert separation(x, y, "l2").neighbour.tolist() in ([1, 0, 0, 0], [2, 0, 0, 0], [3, 0, 0, 0])
    alone = separation(x, torch.zeros(4, dtype=torch.int64), "l2")
    assert alone.distance.isinf().all()
    assert (alone.neighbour == -1).all()
    with pytest.raises(ValueError, match="norm"):
        separation(x, y, "l3")
    with pytest.raises(ValueError, match="together"):
        separation(x, y, queries=x)
    with pytest.raises(ValueError, match="labels"):
        separation(x, y[:2])
