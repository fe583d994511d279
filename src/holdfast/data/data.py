"""Data: a data set as a component of a recipe, and the splits that training, selection and test use."""

from __future__ import annotations

from abc import abstractmethod

import torch
from pydantic import Field, PositiveInt

from holdfast.component import Component
from holdfast.data.image_set import Images, ImageSet, Splits
from holdfast.data.principal_components import PrincipalComponents, parse_indices
from holdfast.data.subsets import stratified_order


class Data(Component, family="data"):
    """A labelled image set with a training and a test part."""

    train_size: PositiveInt | None = None
    """Train on so many images: a stratified subset, nested in every larger one; all by default."""
    validation: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training part that is set aside for validation."""
    components: str | None = None
    """Project all images on these principal components of the training images, such as ``0:16,512:3072``."""
    split_seed: int = 0
    """Decides the validation part and the subsets; independent of the seed of the training."""

    @abstractmethod
    def read(self) -> tuple[Images, Images]:
        """The published training and test parts, whole.

        Raises:
            FileNotFoundError: the data are not there; the message says where they were sought.
        """

    @property
    def conversion(self) -> str:
        """How images come to be as they are given, where files hold others."""
        return ""

    def told(self, splits: Splits) -> str:
        """In one line, what was read: images, shape, classes, the smallest and the largest value among a few
        hundred, and what was done to them."""
        counts = (
            f"{len(splits.train)} training, {len(splits.validation)} validation and {len(splits.test)} test images"
        )
        shape = " × ".join(map(str, splits.train.shape))
        few = torch.cat([part.batch(slice(256))[0].flatten() for part in (splits.train, splits.test)])
        low, high = few.min().item(), few.max().item()
        parts = [counts, f"{shape}, values {low:.3g} to {high:.3g}", f"{len(splits.train.classes)} classes"]
        projected = "projected on principal components" if self.components else ""
        return f"{self.name}: {', '.join([*parts, *filter(None, (self.conversion, projected))])}"

    def load(self) -> Splits:
        """Training, validation and test images.

        The validation part is cut from the far end of a stratified order of the training part, so it is
        the same for every ``train_size``.

        Raises:
            FileNotFoundError: the data are not there.
            ValueError: more training images asked for than there are.
            IndexError: more principal components asked for than there are.
        """
        train, test = self.read()
        if train.shape != test.shape or train.classes != test.classes:
            raise ValueError(
                f"training images are {train.shape} of {len(train.classes)} classes, test images {test.shape} of "
                f"{len(test.classes)}: they must be alike"
            )
        order = stratified_order(train.labels, self.split_seed)
        available = len(train) - round(self.validation * len(train))
        if not 0 < available < len(train) or not len(test):
            raise ValueError(
                f"validation={self.validation} of {len(train)} training images leaves {available} to train on and "
                f"{len(train) - available} to validate on, beside {len(test)} test images: none may be empty"
            )
        if self.train_size is not None and self.train_size > available:
            raise ValueError(
                f"train_size={self.train_size}, but {available} training images remain beside "
                f"{len(train) - available} for validation"
            )
        splits = Splits(train.subset(order[: self.train_size or available]), train.subset(order[available:]), test)
        return splits if self.components is None else _project(splits, parse_indices(self.components))


def _project(splits: Splits, indices: list[int]) -> Splits:
    """All parts on components of the training images; they leave [0, 1], so the threat needs another box."""
    fitted = PrincipalComponents.fit_cached(splits.train.batch(slice(None))[0])

    def project(part: Images) -> ImageSet:
        return ImageSet(fitted.project(part.batch(slice(None))[0], indices), part.labels, part.classes)

    return Splits(project(splits.train), project(splits.validation), project(splits.test))
