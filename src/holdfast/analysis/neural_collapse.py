"""Neural collapse of features at hand, or of batches in one pass; ``collapse_metrics`` says what is measured."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.analysis.collapse_metrics import UNKNOWN, Centre, ClassMeans, NeuralCollapse, Scale
from holdfast.analysis.simplex import nearest_centre
from holdfast.inference import quiet_door

CHUNK = 512
"""Examples that are looked at together: few enough to stay in the cache."""


@quiet_door
def neural_collapse(
    features: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    num_classes: int | None = None,
    centre: Centre = "weighted",
    scale: Scale = "papyan",
    means_of: tuple[Tensor, Tensor] | None = None,
) -> NeuralCollapse:
    """All metrics of one set of features; in float64, and without a d × d matrix.

    Args:
        features: inputs of the last linear layer, (N, d), floating.
        labels: (N,) integers in 0..C−1.
        weight, bias: of that layer, (C, d) and (C,).
        num_classes: C; by default that of the weight, or the largest label and one.
        centre: what is subtracted from class means: ``weighted``, the mean of all examples, or ``class``, the mean
            of the class means.
        scale: ``papyan`` divides NC1 by the number of classes that have examples, ``raw`` does not.
        means_of: features and labels from which the class means come instead, with their counts: how other examples
            sit around them. Examples of a class that they lack count nowhere.

    Raises:
        ValueError: shapes that do not fit, a label outside 0..C−1, NaN or inf in the features.
    """
    meter = CollapseMeter(_classes(labels, weight, num_classes))
    meter.update(*(means_of or (features, labels)), scatter=False)
    meter.check(features, labels)
    labels, classes = labels.long(), meter.classes
    if means_of is not None:
        features, labels = (part[classes.counts[labels] > 0] for part in (features, labels))
    if weight is not None:
        classes.refuse_misfit(weight)
    whitened, lengths = classes.directions(centre)
    within = torch.zeros(whitened.shape[1], dtype=torch.float64, device=features.device)
    squares = torch.zeros(len(classes.counts), dtype=torch.float64, device=features.device)
    nearest, named = [], []
    for x, y in zip(features.split(CHUNK), labels.split(CHUNK), strict=True):
        away = x.double() - classes.means[y]
        within += (away @ whitened).square().sum(0)
        squares.index_add_(0, y, away.square().sum(1))
        nearest.append(nearest_centre(x, meter.means))
        if weight is not None:
            named.append(_logits(x, weight, bias).argmax(1))
    closest = torch.cat(nearest)
    agreement = (torch.cat(named) == closest).double().mean().item() if named else UNKNOWN
    accuracy = (closest == labels).double().mean().item()
    own = torch.bincount(labels, minlength=len(classes.counts))
    parts = within / len(features), lengths, squares, own, agreement, accuracy
    return classes.metrics(weight, bias, centre, scale, *parts)


class CollapseMeter:
    """The same in one pass over batches: float64 sums of C·d + d² numbers, merged in any order.

    NC4 and the accuracy of the nearest class mean need means that are known: where they are wanted, all batches are
    shown once more, to ``revisit``.

    >>> meter = CollapseMeter(2)
    >>> meter.update(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
    >>> meter.compute().nc1
    0.0
    """

    def __init__(self, num_classes: int) -> None:
        if num_classes < 1:
            raise ValueError(f"expected at least one class, given {num_classes}")
        self.num_classes, self._batches = num_classes, 0
        self._counts = torch.zeros(num_classes, dtype=torch.int64)
        self._means = self._squares = self._scatter = torch.zeros(0, dtype=torch.float64)
        self._seen = self._hit = self._named = self._agreed = 0

    @property
    def counts(self) -> Tensor:
        """(C,) int64."""
        return self._counts

    @property
    def means(self) -> Tensor:
        """(C, d) float64, NaN for classes without examples."""
        return self.classes.known

    @property
    def classes(self) -> ClassMeans:
        """Means and counts so far."""
        return ClassMeans(self._means, self._counts)

    def check(self, features: Tensor, labels: Tensor) -> None:
        """Refuse what cannot be counted.

        Raises:
            ValueError: shapes, labels outside 0..C−1, NaN or inf; the message names the batch.
        """
        batch = f"batch {self._batches + 1}"
        if features.dim() != 2 or not features.is_floating_point() or labels.shape != features.shape[:1]:
            raise ValueError(
                f"{batch}: expected features (N, d) and labels (N,), given {tuple(features.shape)} of "
                f"{features.dtype} and {tuple(labels.shape)}"
            )
        if self._means.numel() and features.shape[1] != self._means.shape[1]:
            raise ValueError(f"{batch}: {features.shape[1]} features after {self._means.shape[1]}")
        if (
            labels.is_floating_point()
            or labels.dtype == torch.bool
            or (len(labels) and not 0 <= labels.min() <= labels.max() < self.num_classes)
        ):
            given = f"{labels.min().item()} to {labels.max().item()}" if len(labels) else str(labels.dtype)
            raise ValueError(f"{batch}: labels are integers in 0..{self.num_classes - 1}, given {given}")
        # A sum is many times cheaper than a look at each number, and NaN or inf in it stays.
        if not torch.isfinite(features.sum(dtype=torch.float64)) and not torch.isfinite(features).all():
            first = int((~torch.isfinite(features).all(1)).nonzero()[0])
            raise ValueError(f"{batch}: the features of example {first} are NaN or inf")

    @quiet_door
    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor, *, scatter: bool = True) -> None:
        """Count a batch: features (n, d), labels (n,).

        Args:
            scatter: keep the d × d scatter that NC1 needs.
        """
        self.check(features, labels)
        self._batches += 1
        if not len(labels):
            return
        labels = labels.long()
        counts = torch.bincount(labels, minlength=self.num_classes)
        means = features.new_zeros(self.num_classes, features.shape[1], dtype=torch.float64)
        for x, y in zip(features.split(CHUNK), labels.split(CHUNK), strict=True):
            means.index_add_(0, y, x.double())
        means /= counts.clamp(min=1)[:, None]
        if not scatter:
            self._add(counts, means, torch.zeros_like(means[:, 0]), means.new_zeros(0))
            return
        away = features.double() - means[labels]
        squares = torch.zeros_like(means[:, 0]).index_add_(0, labels, away.square().sum(1))
        self._add(counts, means, squares, away.T @ away)

    def merge(self, other: CollapseMeter) -> None:
        """Take over what another meter has counted, of other examples (Chan et al., 1979).

        Raises:
            ValueError: it counts other classes or features.
        """
        if other.num_classes != self.num_classes:
            raise ValueError(f"a meter of {other.num_classes} classes does not fit one of {self.num_classes}")
        if not other._means.numel():
            return
        if self._means.numel() and other._means.shape != self._means.shape:
            raise ValueError(f"{other._means.shape[1]} features do not fit {self._means.shape[1]}")
        self._add(other._counts, other._means, other._squares, other._scatter)
        self._batches += other._batches

    def _add(self, counts: Tensor, means: Tensor, squares: Tensor, scatter: Tensor) -> None:
        self._seen = self._hit = self._named = self._agreed = 0  # by means that are no longer
        if not self._means.numel():
            self._counts = counts.clone()
            self._means, self._squares, self._scatter = means.clone(), squares.clone(), scatter.clone()
            return
        total = (self._counts + counts).clamp(min=1)
        apart = means - self._means
        shared = self._counts * counts / total.double()  # 0 where either has no example
        self._squares = self._squares + squares + shared * apart.square().sum(1)
        between = apart * shared.sqrt()[:, None]
        if scatter.numel() and self._scatter.numel():
            self._scatter = self._scatter + scatter + between.T @ between
        else:
            self._scatter = scatter.new_zeros(0)
        self._means = self._means + apart * (counts / total.double())[:, None]
        self._counts = self._counts + counts

    @torch.no_grad()
    def revisit(
        self, features: Tensor, labels: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> None:
        """Show a batch once more, for NC4 and the accuracy by the means as they are now; counting more examples
        forgets it.

        Raises:
            ValueError: nothing was counted, or what ``update`` refuses.
        """
        self.check(features, labels)
        if not self._means.numel():
            raise ValueError("nothing was counted yet: there are no means to be near to")
        nearest = nearest_centre(features, self.means)
        self._seen += len(features)
        self._hit += int((nearest == labels).sum())
        if weight is not None:
            self.classes.refuse_misfit(weight)
            self._named += len(features)
            self._agreed += int((_logits(features, weight, bias).argmax(1) == nearest).sum())

    def merge_revisits(self, other: CollapseMeter) -> None:
        """Take over what another meter with the same sums was shown once more, of other examples.

        Raises:
            ValueError: it has counted other examples.
        """
        if not torch.equal(self._counts, other._counts) or not torch.allclose(self._means, other._means):
            raise ValueError("the meters were shown their examples by different means: merge the sums first")
        self._seen, self._hit = self._seen + other._seen, self._hit + other._hit
        self._named, self._agreed = self._named + other._named, self._agreed + other._agreed

    def compute(
        self,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        centre: Centre = "weighted",
        scale: Scale = "papyan",
    ) -> NeuralCollapse:
        """The metrics of all that was counted; arguments as of ``neural_collapse``.

        Raises:
            ValueError: nothing was counted, or a part was counted without its scatter.
        """
        if not int(self._counts.sum()) or not self._scatter.numel():
            raise ValueError("nothing was counted, or without the scatter")
        whitened, lengths = self.classes.directions(centre)
        within = torch.einsum("dk,de,ek->k", whitened, self._scatter, whitened) / self._counts.sum()
        agreement = self._agreed / (self._named or UNKNOWN) if weight is not None else UNKNOWN
        known = agreement, self._hit / (self._seen or UNKNOWN)
        parts = within, lengths, self._squares, self._counts, *known
        return self.classes.metrics(weight, bias, centre, scale, *parts)


def _classes(labels: Tensor, weight: Tensor | None, num_classes: int | None) -> int:
    if num_classes is None:
        num_classes = len(weight) if weight is not None else int(labels.max()) + 1 if len(labels) else 0
    if not len(labels):
        raise ValueError("there are no examples")
    return num_classes


def _logits(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(features.double(), weight.detach().double(), None if bias is None else bias.detach().double())
