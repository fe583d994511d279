"""What examples draw: known words, distributions, and that no draw hangs on another."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from holdfast.draws import Draws

KINDS = ("uniform", "signed", "normal", "exponential")
EXACT = {
    "uniform": stats.uniform(0, 1),
    "signed": stats.uniform(-1, 2),
    "normal": stats.norm(),
    "exponential": stats.expon(),
}


def splitmix(key: int, between: int, number: int) -> int:
    """A word by Python's integers."""
    mask = 2**64 - 1
    z = (key + number * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask) ^ between & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return z ^ (z >> 31)


def words(draws: Draws, count: int) -> Tensor:
    return draws.bits(2 * count).contiguous().view(torch.int64)


def test_words_are_those_of_splitmix() -> None:
    draws = Draws(torch.tensor([[-5, 2**62], [17, -(2**63)]]))
    found = words(draws, 9)
    for row, (key, between) in enumerate(draws.keys.tolist()):
        assert [word % 2**64 for word in found[row].tolist()] == [splitmix(key, between, n) for n in range(9)]
    # The first word of SplitMix64 with the seed 0, from its reference implementation: the state moves before it.
    (word,) = words(Draws(torch.tensor([[0, 0]])), 2)[0, 1:].tolist()
    assert word % 2**64 == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("kind", [*KINDS, "bits"])
def test_a_number_hangs_on_seed_example_and_its_place_only(kind: str) -> None:
    indices = torch.tensor([3, 10_000_000_019, 4, 0, 77])
    whole = getattr(Draws.of(5, indices, 1), kind)(1001)
    assert torch.equal(whole, getattr(Draws.of(5, indices, 1), kind)(1001))
    for row in range(5):
        alone = Draws.of(5, [int(indices[row])], 1)
        assert torch.equal(getattr(alone, kind)(1001)[0], whole[row])
        for at, count in ((0, 7), (1, 8), (2, 1), (993, 8)):
            assert torch.equal(getattr(alone, kind)(count, at=at)[0], whole[row, at : at + count])
    assert torch.equal(getattr(Draws.of(5, indices, 1).take(torch.tensor([4, 1])), kind)(9), whole[[4, 1], :9])
    assert getattr(Draws.of(5, indices[:0]), kind)(3).shape == (0, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_distributions(kind: str) -> None:
    """Kolmogorov's distance over all, over one example and over one number."""
    drawn = getattr(Draws.of(0, range(500), 7), kind)(500)
    assert drawn.dtype == torch.float32
    assert torch.isfinite(drawn).all()
    for sample in (drawn.flatten(), drawn[0], drawn[:, 0], drawn[:, 1], drawn.diagonal()):
        assert stats.kstest(sample.numpy(), EXACT[kind].cdf).pvalue > 1e-3


def test_the_ends_of_the_word() -> None:
    class Fixed(Draws):
        def bits(self, count: int, at: int = 0) -> Tensor:
            return torch.tensor([[-(2**31), 2**31 - 1, 0, -1]], dtype=torch.int32)[:, :count]

    draws = Fixed(torch.zeros(1, 2, dtype=torch.int64))
    assert draws.uniform(4).max() < 1
    assert draws.uniform(4).min() >= 0
    assert draws.signed(4).abs().max() <= 1
    assert draws.below(3, 4).tolist() == [[0, 2, 1, 1]]
    assert torch.isfinite(draws.exponential(4)).all()
    assert (draws.exponential(4) >= 0).all()
    assert torch.isfinite(draws.normal(4)).all()
    assert draws.normal(4).abs().max() < 6.8


def test_integers_are_uniform() -> None:
    drawn = Draws.of(3, range(300)).below(7, 300)
    counts = torch.bincount(drawn.flatten(), minlength=7)
    assert len(counts) == 7
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("kind", ["signed", "normal"])
def test_neighbours_are_independent(kind: str) -> None:
    """Of examples, seeds, salts and numbers: correlations of n pairs have the deviation 1 / √n."""
    first = getattr(Draws.of(0, range(400)), kind)(401).double().numpy()
    others = {
        "number": (first[:, :-1], first[:, 1:]),
        "number, squares": (first[:, :-1] ** 2, first[:, 1:] ** 2),
        "example": (first[:-1], first[1:]),
        "example, one number on": (first[:-1, :-1], first[1:, 1:]),
        "seed": (first, getattr(Draws.of(1, range(400)), kind)(401).double().numpy()),
        "salt": (first, getattr(Draws.of(0, range(400), 0), kind)(401).double().numpy()),
    }
    for name, (a, b) in others.items():
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4.5 / math.sqrt(a.size), name


def test_every_bit_is_fair_and_flips_with_half_the_others() -> None:
    word = words(Draws.of(9, range(200)), 200)
    bits = (word[..., None] >> torch.arange(64)) & 1
    assert ((bits.double().mean((0, 1)) - 0.5).abs() < 4.5 * 0.5 / 200).all()
    # What one more example or number changes: every bit in half of the words.
    for change in (bits[1:] != bits[:-1], bits[:, 1:] != bits[:, :-1]):
        assert ((change.double().mean((0, 1)) - 0.5).abs() < 4.5 * 0.5 / 199).all()


def test_no_two_words_are_the_same() -> None:
    drawn = torch.cat(
        [words(Draws.of(seed, range(100), salt), 50).flatten() for seed in range(5) for salt in (1, 2)]
    )
    assert len(drawn.unique()) == len(drawn)


def test_generators_give_another_stream_every_time() -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2, 1)]
    first, second = Draws.by(generators).uniform(50), Draws.by(generators).uniform(50)
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], second[0])
