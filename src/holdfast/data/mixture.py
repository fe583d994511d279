"""Real images and generated ones, mixed by share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from holdfast.data.data import Data
from holdfast.data.image_set import Images, Splits, permutation
from holdfast.data.subsets import stratified_order


class Mixture(Data, name="mixture"):
    """Training images of one data set among those of another, usually generated, one (Gowal et al., 2021).

    An epoch presents every real image once, and so many generated ones that they make up ``share`` of it
    and, to one image, of every batch. The generated ones follow on from epoch to epoch until all have been
    seen, and begin again in another order. Validation and test images are real.
    """

    real: Data
    """The data set that is validated and tested on; ``train_size`` and the like are settings of the mixture."""
    generated: Data
    """Whose training images are mixed in, all of them or its own ``train_size``; of the same classes and size."""
    share: float = Field(default=0.7, gt=0, lt=1)
    """Of the generated images among those trained on."""

    @model_validator(mode="after")
    def _settings_where_they_act(self) -> Self:
        idle = [("real", self.real, key) for key in Data.model_fields]
        sized = ("train_size", "split_seed") if self.generated.train_size else ("train_size",)
        idle += [("generated", self.generated, key) for key in Data.model_fields if key not in sized]
        for part, data, key in idle:
            if getattr(data, key) != Data.model_fields[key].default:
                raise ValueError(f"{part}.{key} would do nothing; it is a setting of the mixture")
        if self.components:
            raise ValueError("a mixture has no principal components of its own")
        return self

    def read(self) -> tuple[Images, Images]:
        return self.real.read()

    def load(self) -> Splits:
        splits = super().load()
        generated, _ = self.generated.read()
        if generated.shape != splits.train.shape or generated.classes != splits.train.classes:
            raise ValueError(
                f"generated images are {generated.shape} of {len(generated.classes)} classes, real ones "
                f"{splits.train.shape} of {len(splits.train.classes)}: they must be alike"
            )
        size = self.generated.train_size
        if size is not None:
            if size > len(generated):
                raise ValueError(f"generated.train_size={size}, but there are {len(generated)} generated images")
            generated = generated.subset(stratified_order(generated.labels, self.generated.split_seed)[:size])
        return Splits(MixedSet(splits.train, generated, self.share), splits.validation, splits.test)


@dataclass(frozen=True)
class MixedSet(Images):
    """Real images, numbered first, and generated ones."""

    real: Images
    generated: Images
    share: float
    """Of the generated ones in an epoch."""

    @cached_property
    def labels(self) -> Tensor:  # type: ignore[override]
        return torch.cat([self.real.labels, self.generated.labels])

    @property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.real.classes

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.real.shape

    @property
    def epoch_size(self) -> int:
        return len(self.real) + self._generated_per_epoch

    @property
    def _generated_per_epoch(self) -> int:
        return max(1, round(len(self.real) * self.share / (1 - self.share)))

    def order(self, epoch: int, seed: int) -> Tensor:
        many, available = self._generated_per_epoch, len(self.generated)
        position = torch.arange(epoch * many, (epoch + 1) * many)
        passes = range(int(position[0]) // available, int(position[-1]) // available + 1)
        generated = torch.cat([permutation(available, seed, number, 4) for number in passes])
        generated = generated[position - passes.start * available] + len(self.real)
        place = torch.arange(self.epoch_size + 1) * many // self.epoch_size
        order = torch.empty(self.epoch_size, dtype=torch.int64)
        order[place.diff() == 1] = generated
        order[place.diff() == 0] = permutation(len(self.real), seed, epoch, 1)
        return order

    def batch(self, indices: Sequence[int] | Tensor | slice) -> tuple[Tensor, Tensor]:
        if isinstance(indices, slice):
            indices = torch.arange(len(self))[indices]
        indices = torch.as_tensor(indices, dtype=torch.int64)
        is_real = indices < len(self.real)
        generated = self.generated.batch(indices[~is_real] - len(self.real))
        return self._in_order(is_real, self.real.batch(indices[is_real]), generated)

    @staticmethod
    def _in_order(
        is_real: Tensor, real: tuple[Tensor, Tensor], generated: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        back = torch.cat([is_real.nonzero(), (~is_real).nonzero()]).squeeze(1).argsort()
        x, y = (torch.cat(parts) for parts in zip(real, generated, strict=True))
        return x[back.to(x.device)], y[back.to(y.device)]

    def stream(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """``batch`` of each of these; both parts stream in their own way."""
        real = self.real.stream([batch[batch < len(self.real)] for batch in batches])
        made = self.generated.stream([batch[batch >= len(self.real)] - len(self.real) for batch in batches])
        for batch, first, second in zip(batches, real, made, strict=True):
            yield self._in_order(batch < len(self.real), first, second)

    def subset(self, indices: Sequence[int] | Tensor) -> Images:
        """The examples of these numbers, real before generated ones; of one kind only, where they are."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        is_real = indices < len(self.real)
        real, generated = (
            self.real.subset(indices[is_real]),
            self.generated.subset(indices[~is_real] - len(self.real)),
        )
        return (
            MixedSet(real, generated, self.share)
            if len(real) and len(generated)
            else real
            if len(real)
            else generated
        )

    def to(self, device: torch.device | str) -> MixedSet:
        return MixedSet(self.real.to(device), self.generated.to(device), self.share)
