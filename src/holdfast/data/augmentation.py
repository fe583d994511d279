"""Augmentation: batched on the device, drawn anew for every image, seeded.

A recipe lists them in the order in which they apply, by name and settings or as a preset:

    training: {augmentations: [flip, {name: crop, padding: 4, mode: reflect}]}
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from holdfast.component import Component

CIFAR10_MEAN = [0.491, 0.482, 0.447]
PADDING = {"zeros": "constant", "reflect": "reflect", "edge": "replicate"}
"""What torch calls them."""


class Augmentation(Component, family="augmentations"):
    """A random change of training images, different for every image of a batch."""

    @abstractmethod
    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The changed images and their labels.

        Args:
            x: (N, C, H, W) in [0, 1].
            y: labels (N,), or class probabilities (N, K).
            generator: on the CPU; every draw comes from it, so that all devices see the same.
        """


class Flip(Augmentation, name="flip"):
    """Left and right change places."""

    probability: float = Field(default=0.5, ge=0, le=1)
    """Share of the images that are flipped."""

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        flipped = torch.rand(len(x), generator=generator).lt(self.probability)
        rows = flipped.nonzero().squeeze(1).to(x.device)
        return x.index_copy(0, rows, x.index_select(0, rows).flip(3)), y


class Crop(Augmentation, name="crop"):
    """A window of the image's own size out of the padded image."""

    padding: PositiveInt = 4
    """Pixels added on every side."""
    mode: Literal["zeros", "reflect", "edge"] = "zeros"
    """What is added: black, the image mirrored at its border, or its outermost pixels again."""

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        number, channels, height, width = x.shape
        if self.mode == "reflect" and self.padding >= min(height, width):
            raise ValueError(f"{height} × {width} images cannot be mirrored {self.padding} pixels deep")
        padded = F.pad(x, [self.padding] * 4, mode=PADDING[self.mode]).contiguous()
        top, left = torch.randint(0, 2 * self.padding + 1, (2, number), generator=generator)
        # A view of the windows that begin at every pixel; index_select copies those that are asked for.
        image, plane, row, _ = padded.stride()
        starts = padded.numel() - (channels - 1) * plane - (height - 1) * row - (width - 1)
        windows = padded.as_strided((starts, channels, height, width), (1, plane, row, 1))
        return windows.index_select(0, (image * torch.arange(number) + row * top + left).to(x.device)), y


class Erase(Augmentation, name="erase"):
    """One square, somewhere inside the image, becomes a constant colour."""

    size: PositiveInt = 8
    """Side of the square in pixels."""
    value: list[float] = [0.5]
    """The colour: one number, or one per channel."""

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        number, channels, height, width = x.shape
        if self.size > min(height, width) or len(self.value) not in (1, channels):
            raise ValueError(f"a square of {self.size} in {self.value} does not fit images of {tuple(x.shape[1:])}")
        top = torch.randint(0, height - self.size + 1, (number, 1), generator=generator).to(x.device)
        left = torch.randint(0, width - self.size + 1, (number, 1), generator=generator).to(x.device)
        rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
        inside_rows = (rows >= top) & (rows < top + self.size)
        inside_columns = (columns >= left) & (columns < left + self.size)
        erased = (inside_rows[:, :, None] & inside_columns[:, None, :])[:, None]
        return torch.where(erased, torch.tensor(self.value, device=x.device).view(1, -1, 1, 1), x), y


class GaussianNoise(Augmentation, name="gaussian-noise"):
    """Independent normal noise on every pixel; images may leave [0, 1], as randomised smoothing wants it."""

    sigma: NonNegativeFloat = 0.25
    """Standard deviation in input units."""

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return x + self.sigma * torch.randn(x.shape, generator=generator).to(x), y


class Mixup(Augmentation, name="mixup"):
    """λ x + (1 − λ) x' with another image of the batch, and the labels likewise (Zhang et al., 2018).

    λ is drawn from Beta(α, α) for every image. The labels become probabilities, which certified losses
    refuse.
    """

    alpha: PositiveFloat = 0.2
    """Parameter of the Beta distribution."""
    num_classes: PositiveInt = 10
    """Number of classes."""

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        gamma = torch._standard_gamma(torch.full((2, len(x)), self.alpha), generator=generator)
        share = (gamma[0] / gamma.sum(0)).nan_to_num(0.5).to(x)
        partner = torch.randperm(len(x), generator=generator).to(x.device)
        labels = probabilities(y, self.num_classes).to(x.dtype)
        by_image, by_label = share[:, None, None, None], share[:, None]
        return (
            by_image * x + (1 - by_image) * x[partner],
            by_label * labels + (1 - by_label) * labels[partner],
        )


def probabilities(y: Tensor, num_classes: int) -> Tensor:
    """Labels (N,) as probabilities (N, K); probabilities as they are."""
    return y if y.is_floating_point() else F.one_hot(y, num_classes).float()


class CropFlip(Augmentation, name="crop-flip"):
    """Zero-padded 4-pixel crop and flip: the usual CIFAR augmentation, and that of adversarial training."""

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return _all([Crop(padding=4), Flip()], x, y, generator)


class MnistCrop(Augmentation, name="mnist-crop"):
    """Zero-padded 2-pixel crop."""

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return Crop(padding=2)(x, y, generator)


class NinetyFourPercent(Augmentation, name="94percent"):
    """Mirrored 4-pixel crop, flip, and one 8 × 8 square in the mean colour of CIFAR-10 (Prach & Lampert, 2024).

    The original draws once per batch; here every image has its own crop, flip and square.
    """

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return _all([Crop(padding=4, mode="reflect"), Flip(), Erase(size=8, value=CIFAR10_MEAN)], x, y, generator)


class NinetyFourPercentGaussian(Augmentation, name="94percent-gaussian"):
    """``94percent`` and Gaussian noise on top."""

    sigma: NonNegativeFloat = 0.125
    """Standard deviation in input units."""

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return _all([NinetyFourPercent(), GaussianNoise(sigma=self.sigma)], x, y, generator)


def _all(parts: list[Augmentation], x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    for part in parts:
        x, y = part(x, y, generator)
    return x, y
