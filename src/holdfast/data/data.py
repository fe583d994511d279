"""Data: a data set as a component of a recipe, and the splits that training, selection and test use."""

from __future__ import annotations

from abc import abstractmethod

from pydantic import Field, PositiveInt

from holdfast.component import Component
from holdfast.data.image_set import ImageSet, Splits
from holdfast.data.subsets import stratified_order


class Data(Component, family="data"):
    """A labelled image set with a training and a test part."""

    train_size: PositiveInt | None = None
    """Train on so many images: a stratified subset, nested in every larger one; all by default."""
    validation: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training part that is set aside for validation."""
    split_seed: int = 0
    """Decides the validation part and the subsets; independent of the seed of the training."""

    @abstractmethod
    def read(self) -> tuple[ImageSet, ImageSet]:
        """The published training and test parts, whole.

        Raises:
            FileNotFoundError: the data are not there; the message says where they were sought.
        """

    def load(self) -> Splits:
        """Training, validation and test images.

        The validation part is cut from the far end of a stratified order of the training part, so it is
        the same for every ``train_size``.

        Raises:
            FileNotFoundError: the data are not there.
            ValueError: more training images asked for than there are.
        """
        train, test = self.read()
        order = stratified_order(train.labels, self.split_seed)
        available = len(train) - round(self.validation * len(train))
        if self.train_size is not None and self.train_size > available:
            raise ValueError(
                f"train_size={self.train_size}, but {available} training images remain beside "
                f"{len(train) - available} for validation"
            )
        return Splits(train.subset(order[: self.train_size or available]), train.subset(order[available:]), test)
