"""The handwritten digits that come with scikit-learn."""

from __future__ import annotations

import torch

from holdfast.data.data import Data
from holdfast.data.image_set import ImageSet
from holdfast.data.subsets import stratified_order


class Digits(Data, name="digits"):
    """1,797 handwritten digits of 8 × 8 pixels, embedded with scikit-learn; a fixed fifth is the test part.

    The 17 grey levels are spread over 0..255, so that an image in [0, 1] is the original over 16 to
    within 1/510.
    """

    def read(self) -> tuple[ImageSet, ImageSet]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
        labels = torch.from_numpy(digits.target).to(torch.int64)
        whole = ImageSet(images, labels, tuple(map(str, range(10))))
        order = stratified_order(labels, seed=0)
        return whole.subset(order[360:]), whole.subset(order[:360])
