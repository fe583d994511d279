"""Everything that is drawn for an example, by counting: a hash of (seed, example, number of the draw).

There is no state: a batch draws in one block on its own device, and what one example draws hangs neither on its
neighbours nor on what was drawn before.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GOLDEN = -7046029254386353131
"""2⁶⁴ over the golden ratio, odd, as int64: the stride of SplitMix64 (Steele, Lea & Flood, 2014)."""
FIRST, SECOND = -4658895280553007687, -7723592293110705685
"""The multipliers of its two rounds, as int64."""


@dataclass(frozen=True)
class Draws:
    """What N examples draw: each has its stream of numbers 0, 1, 2, …; a method takes some, from ``at`` on."""

    keys: Tensor
    """Two 64-bit words of each example, (N, 2) int64."""

    @classmethod
    def of(cls, seed: int, indices: Sequence[int] | range | Tensor, *salt: int) -> Draws:
        """Of examples by their numbers (N,), on the device of these; another salt gives unrelated streams."""
        numbers = torch.as_tensor(indices, dtype=torch.int64)[:, None]
        digest = hashlib.blake2b(repr((seed, *salt)).encode(), digest_size=32).digest()
        word = [int.from_bytes(digest[at : at + 8], "little", signed=True) for at in (0, 8, 16, 24)]
        keys = [_mixed(numbers * GOLDEN + word[k], word[k + 1]) for k in (0, 2)]
        return cls(torch.cat(keys, 1))

    @classmethod
    def by(cls, generators: Sequence[torch.Generator]) -> Draws:
        """One stream for each CPU generator, another one every time."""
        keys = torch.empty(len(generators), 2, dtype=torch.int64)
        for row, generator in zip(keys, generators, strict=True):
            row.random_(generator=generator)
        return cls(keys)

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: Tensor) -> Draws:
        """Those of some of the examples."""
        return Draws(self.keys[rows])

    def to(self, device: torch.device) -> Draws:
        """On a device."""
        return Draws(self.keys.to(device))

    def bits(self, count: int, at: int = 0) -> Tensor:
        """32 random bits each, (N, count) int32. A word of 64 makes the numbers 2 k and 2 k + 1."""
        first, last = at // 2, (at + count + 1) // 2
        words = torch.arange(first, last, device=self.keys.device) * GOLDEN
        hashed = _mixed(self.keys[:, :1] + words, self.keys[:, 1:])
        return hashed.view(torch.int32)[:, at % 2 : at % 2 + count]

    def uniform(self, count: int, at: int = 0) -> Tensor:
        """Uniform in [0, 1), multiples of 2⁻²⁴, (N, count) float32."""
        return (self.bits(count, at).bitwise_right_shift(8) & 0xFFFFFF).float() * 2.0**-24

    def signed(self, count: int, at: int = 0) -> Tensor:
        """Uniform in [−1, 1], (N, count) float32."""
        return self.bits(count, at).float() * 2.0**-31

    def below(self, limit: int, count: int, at: int = 0) -> Tensor:
        """Uniform integers in 0..limit−1, (N, count) int64; limit ≤ 2³¹."""
        return (self.bits(count, at).long() + 2**31) * limit >> 32

    def exponential(self, count: int, at: int = 0) -> Tensor:
        """Exponential variables of mean 1, (N, count) float32: −log u, with u > 0."""
        return -self._inside(self.bits(count, at)).log().float()

    def normal(self, count: int, at: int = 0) -> Tensor:
        """Standard normal variables, (N, count) float32, none beyond 6.8 (Box & Muller, 1958)."""
        pairs = self.bits((at + count + 1) // 2 * 2 - at // 2 * 2, at // 2 * 2).unflatten(1, (-1, 2))
        length = self._inside(pairs[..., 0]).log_().mul_(-2).sqrt_()
        turn = pairs[..., 1].double() * (math.pi * 2.0**-31)
        both = torch.empty(pairs.shape, device=pairs.device)
        both[..., 0], both[..., 1] = length * turn.cos(), length * turn.sin()
        return both.flatten(1)[:, at % 2 : at % 2 + count]

    @staticmethod
    def _inside(bits: Tensor) -> Tensor:
        """Uniform in (0, 1), float64: rounded to float32 later, functions of them are the same in every batch."""
        return bits.double().add_(2**31 + 0.5).mul_(2.0**-32)


def _mixed(word: Tensor, between: Tensor | int) -> Tensor:
    """The two rounds of SplitMix64 on int64 words, in place, with a second key between them."""
    word ^= word.bitwise_right_shift(30).bitwise_and_(2**34 - 1)
    word = word.mul_(FIRST).bitwise_xor_(between)
    word ^= word.bitwise_right_shift(27).bitwise_and_(2**37 - 1)
    word.mul_(SECOND)
    word ^= word.bitwise_right_shift(31).bitwise_and_(2**33 - 1)
    return word
