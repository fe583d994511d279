"""Stratified, seeded, nested subsets."""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.inference import mix_seed


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """A seeded permutation of 0..N−1 of which every prefix holds the classes in proportion, (N,) int64.

    Each class is shuffled and its examples are spread evenly over [0, 1); reading all of them from left
    to right gives the order. A prefix of n examples holds n · share of each class, to within one or two.
    """
    labels = labels.cpu()
    position = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        generator = torch.Generator().manual_seed(mix_seed(seed, int(label)))
        rank = torch.randperm(len(members), generator=generator)
        offset = torch.rand((), generator=generator, dtype=torch.float64)
        position[members] = (rank + offset) / len(members)
    return position.argsort(stable=True)


def drawn(labels: Tensor, count: int | None, draw: int) -> Tensor:
    """The numbers of a stratified sample, (n,) int64: the first n of those drawn for any larger number.

    Args:
        count: how many; all of them where there are no more, or for None.
        draw: the number of the draw.
    """
    return stratified_order(labels, mix_seed(draw, 41))[:count]
