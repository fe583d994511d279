"""Neural collapse: how near the last features are to a simplex of class means that the classifier mirrors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.analysis.simplex import equiangle, etf_error, nearest_centre, variation

Centre = Literal["weighted", "class"]
Scale = Literal["papyan", "raw"]
UNKNOWN = float("nan")
CHUNK = 512
"""Examples that are looked at together: few enough to stay in the cache."""


@dataclass(frozen=True)
class NeuralCollapse:
    """Everything is 0 under full collapse, but for ``ncc_accuracy``, the kernels and the vectors.

    Classes without examples are in ``absent`` and count nowhere; numbers that need two classes, a classifier or a
    second look at the features are NaN without them.
    """

    nc1: float
    """Tr(S_w S_b⁺), divided by C with ``scale="papyan"`` (Papyan et al., 2020)."""
    nc1_svd: float
    """The same with the C − 1 largest directions of S_b alone."""
    nc1_quotient: float
    """Tr S_w / Tr S_b."""
    cdnv: float
    """Mean over pairs of classes of (v_a + v_b) / (2 ‖μ_a − μ_b‖²), v the mean squared distance to the own mean
    (Galanti et al., 2022)."""
    nc2_norm_means: float
    """Standard deviation over mean of the centred class means' lengths."""
    nc2_norm_weights: float
    """The same of the classifier's rows, which are not centred."""
    nc2_angle_means: float
    """Mean over pairs of |cos + 1 / (C − 1)|, between centred class means."""
    nc2_angle_weights: float
    """The same between the classifier's rows."""
    etf_error_means: float
    """‖G / ‖G‖ − E / ‖E‖‖_F of their Gram matrix G and the simplex's E = I − 1 1ᵀ / C."""
    etf_error_weights: float
    nc3: float
    """‖W / ‖W‖_F − M / ‖M‖_F‖²_F, M the centred class means."""
    dual_etf_error: float
    """The ETF error of W Mᵀ."""
    nc3_classes: Tensor
    """‖W_c / ‖W_c‖ − M_c / ‖M_c‖‖ of each class, (C,)."""
    nc4: float
    """Share of the examples for which the network and the nearest class mean disagree; labels play no part."""
    ncc_accuracy: float
    """Share of the examples whose nearest class mean is that of their label."""
    uniformity_distance: float
    """Generalised NC2 (Liu et al., 2023): coefficient of variation of the pairwise distances of unit means."""
    uniformity_log: float
    """Variance of −log of these distances."""
    duality_variance: float
    """Variance over the classes of the cosine between W_c and M_c: uniform duality."""
    bias_collapse: float
    """‖W μ_G + b‖."""
    class_means: Tensor
    """(C, d) float64, not centred; NaN for an absent class."""
    global_mean: Tensor
    """(d,)."""
    counts: Tensor
    """(C,) int64."""
    absent: tuple[int, ...]
    """Classes without examples."""

    @property
    def scalars(self) -> dict[str, float]:
        """The numbers by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, float)}


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
    classes = _classes(labels, weight, num_classes)
    meter = CollapseMeter(classes)
    meter.update(*(means_of or (features, labels)), scatter=False)
    meter.check(features, labels)
    labels = labels.long()
    if means_of is not None:
        features, labels = (part[meter._counts[labels] > 0] for part in (features, labels))
    if weight is not None:
        meter._refuse_misfit(weight)
    whitened, lengths = meter._directions(centre)
    within = torch.zeros(whitened.shape[1], dtype=torch.float64, device=features.device)
    squares = torch.zeros(classes, dtype=torch.float64, device=features.device)
    nearest, named = [], []
    for x, y in zip(features.split(CHUNK), labels.split(CHUNK), strict=True):
        away = x.double() - meter._means[y]
        within += (away @ whitened).square().sum(0)
        squares.index_add_(0, y, away.square().sum(1))
        nearest.append(nearest_centre(x, meter.means))
        if weight is not None:
            named.append(_logits(x, weight, bias).argmax(1))
    closest = torch.cat(nearest)
    agreement = (torch.cat(named) == closest).double().mean().item() if named else UNKNOWN
    accuracy = (closest == labels).double().mean().item()
    own = torch.bincount(labels, minlength=classes)
    parts = within / len(features), lengths, squares, own, agreement, accuracy
    return meter._metrics(weight, bias, centre, scale, *parts)


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
        return self._means.masked_fill((self._counts == 0)[:, None], torch.nan)

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
            self._refuse_misfit(weight)
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
        whitened, lengths = self._directions(centre)
        within = torch.einsum("dk,de,ek->k", whitened, self._scatter, whitened) / self._counts.sum()
        agreement = self._agreed / (self._named or UNKNOWN) if weight is not None else UNKNOWN
        known = agreement, self._hit / (self._seen or UNKNOWN)
        return self._metrics(weight, bias, centre, scale, within, lengths, self._squares, self._counts, *known)

    def _refuse_misfit(self, weight: Tensor) -> None:
        if weight.shape != self._means.shape:
            raise ValueError(f"expected a weight {tuple(self._means.shape)}, given {tuple(weight.shape)}")

    def _centred(self, centre: Centre) -> tuple[Tensor, Tensor]:
        """Centred means of the classes that have examples (P, d), and the centre (d,)."""
        present = self._counts > 0
        means = self._means[present]
        if centre not in ("weighted", "class"):
            raise ValueError(f"expected the centre weighted or class, given {centre!r}")
        shares = self._counts[present].double()
        middle = (shares / shares.sum()) @ means if centre == "weighted" else means.mean(0)
        return means - middle, middle

    def _directions(self, centre: Centre) -> tuple[Tensor, Tensor]:
        """V (d, r) with V Vᵀ = S_b⁺, strongest direction first, and the lengths of S_b's directions, (r,)."""
        centred, _ = self._centred(centre)
        _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
        variances = singular.square() / len(centred)
        rounding = torch.finfo(torch.float64).eps
        largest = self._means.abs().max()  # NaN nowhere: absent classes hold zeros here
        floor = max(centred.shape) * rounding * variances[:1].sum() + centred.shape[1] * (rounding * largest) ** 2
        kept = variances > floor
        return (directions[kept] / variances[kept].sqrt()[:, None]).T, variances[kept]

    def _metrics(
        self,
        weight: Tensor | None,
        bias: Tensor | None,
        centre: Centre,
        scale: Scale,
        within: Tensor,
        lengths: Tensor,
        squares: Tensor,
        counts: Tensor,
        agreement: float,
        accuracy: float,
    ) -> NeuralCollapse:
        """From what has been summed: ``within`` holds the parts of Tr(S_w S_b⁺) by direction."""
        if scale not in ("papyan", "raw"):
            raise ValueError(f"expected the scale papyan or raw, given {scale!r}")
        present = (self._counts > 0).nonzero().squeeze(1)
        number = len(present)
        centred, middle = self._centred(centre)
        several = number > 1 and len(lengths) > 0
        divisor = number if scale == "papyan" else 1
        rows = None
        if weight is not None:
            self._refuse_misfit(weight)
            rows = weight.detach().double()[present]
        offset = 0.0 if bias is None else bias.detach().double()[present]
        spread = squares[present] / counts[present]  # NaN where the other examples lack the class
        nc3_classes = spread.new_full((self.num_classes,), torch.nan)
        if rows is not None and several:
            nc3_classes[present] = (F.normalize(rows, dim=1) - F.normalize(centred, dim=1)).norm(dim=1)
        pairs = torch.pdist(F.normalize(centred, dim=1)) if several else torch.zeros(0)
        dual = rows is not None and several
        return NeuralCollapse(
            nc1=within.sum().item() / divisor if several else UNKNOWN,
            nc1_svd=within[: number - 1].sum().item() / divisor if several else UNKNOWN,
            nc1_quotient=(squares.sum() / counts.sum() / lengths.sum()).item() if several else UNKNOWN,
            cdnv=_cdnv(self._means[present], spread) if several else UNKNOWN,
            nc2_norm_means=variation(centred.norm(dim=1)) if several else UNKNOWN,
            nc2_norm_weights=variation(rows.norm(dim=1)) if rows is not None and number > 1 else UNKNOWN,
            nc2_angle_means=equiangle(centred) if several else UNKNOWN,
            nc2_angle_weights=equiangle(rows) if rows is not None and number > 1 else UNKNOWN,
            etf_error_means=etf_error(centred @ centred.T) if several else UNKNOWN,
            etf_error_weights=etf_error(rows @ rows.T) if rows is not None and number > 1 else UNKNOWN,
            nc3=_distance(rows, centred) if dual and rows is not None else UNKNOWN,
            dual_etf_error=etf_error(rows @ centred.T) if dual and rows is not None else UNKNOWN,
            nc3_classes=nc3_classes,
            nc4=1 - agreement,
            ncc_accuracy=accuracy,
            uniformity_distance=variation(pairs, unbiased=False) if len(pairs) else UNKNOWN,
            uniformity_log=pairs.log().neg().var(correction=0).item() if len(pairs) else UNKNOWN,
            duality_variance=F.cosine_similarity(rows, centred).var().item()
            if dual and rows is not None
            else UNKNOWN,
            bias_collapse=(rows @ middle + offset).norm().item() if rows is not None else UNKNOWN,
            class_means=self.means,
            global_mean=middle,
            counts=self._counts.clone(),
            absent=tuple((self._counts == 0).nonzero().squeeze(1).tolist()),
        )


def _classes(labels: Tensor, weight: Tensor | None, num_classes: int | None) -> int:
    if num_classes is None:
        num_classes = len(weight) if weight is not None else int(labels.max()) + 1 if len(labels) else 0
    if not len(labels):
        raise ValueError("there are no examples")
    return num_classes


def _logits(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(features.double(), weight.detach().double(), None if bias is None else bias.detach().double())


def _distance(rows: Tensor, centred: Tensor) -> float:
    return (rows / rows.norm() - centred / centred.norm()).square().sum().item()


def _cdnv(means: Tensor, spread: Tensor) -> float:
    first, second = torch.triu_indices(len(means), len(means), 1)
    apart = torch.pdist(means).square()
    return ((spread[first] + spread[second]) / (2 * apart)).nanmean().item()
