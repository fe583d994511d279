"""What neural collapse is: how near the class means are to a simplex that the classifier mirrors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.analysis.simplex import equiangle, etf_error, variation

Centre = Literal["weighted", "class"]
Scale = Literal["papyan", "raw"]
UNKNOWN = float("nan")


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


@dataclass(frozen=True)
class ClassMeans:
    """The means of the classes, and what is measured between them, a classifier and the spread around them."""

    means: Tensor
    """(C, d) float64, not centred; zeros for a class without examples."""
    counts: Tensor
    """(C,) int64."""

    @property
    def known(self) -> Tensor:
        """The means, NaN for classes without examples."""
        return self.means.masked_fill((self.counts == 0)[:, None], torch.nan)

    def refuse_misfit(self, weight: Tensor) -> None:
        """Refuse a classifier of other classes or features.

        Raises:
            ValueError: it is not (C, d).
        """
        if weight.shape != self.means.shape:
            raise ValueError(f"expected a weight {tuple(self.means.shape)}, given {tuple(weight.shape)}")

    def centred(self, centre: Centre) -> tuple[Tensor, Tensor]:
        """Centred means of the classes that have examples (P, d), and the centre (d,)."""
        present = self.counts > 0
        means = self.means[present]
        if centre not in ("weighted", "class"):
            raise ValueError(f"expected the centre weighted or class, given {centre!r}")
        shares = self.counts[present].double()
        middle = (shares / shares.sum()) @ means if centre == "weighted" else means.mean(0)
        return means - middle, middle

    def directions(self, centre: Centre) -> tuple[Tensor, Tensor]:
        """V (d, r) with V Vᵀ = S_b⁺, strongest direction first, and the lengths of S_b's directions, (r,)."""
        centred, _ = self.centred(centre)
        _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
        variances = singular.square() / len(centred)
        rounding = torch.finfo(torch.float64).eps
        largest = self.means.abs().max()  # NaN nowhere: absent classes hold zeros here
        floor = max(centred.shape) * rounding * variances[:1].sum() + centred.shape[1] * (rounding * largest) ** 2
        kept = variances > floor
        return (directions[kept] / variances[kept].sqrt()[:, None]).T, variances[kept]

    def metrics(
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
        """From what has been summed.

        Args:
            weight, bias, centre, scale: as of ``neural_collapse``.
            within, lengths: the parts of Tr(S_w S_b⁺) by direction, and the lengths of S_b's directions, (r,).
            squares, counts: squared distances to the own mean, and of how many examples, (C,).
            agreement, accuracy: 1 − NC4, and the share whose nearest mean is their label's.

        Raises:
            ValueError: a weight of another shape, an unknown centre or scale.
        """
        if scale not in ("papyan", "raw"):
            raise ValueError(f"expected the scale papyan or raw, given {scale!r}")
        present = (self.counts > 0).nonzero().squeeze(1)
        number = len(present)
        centred, middle = self.centred(centre)
        several = number > 1 and len(lengths) > 0
        divisor = number if scale == "papyan" else 1
        rows = None
        if weight is not None:
            self.refuse_misfit(weight)
            rows = weight.detach().double()[present]
        offset = 0.0 if bias is None else bias.detach().double()[present]
        spread = squares[present] / counts[present]  # NaN where the other examples lack the class
        nc3_classes = spread.new_full((len(self.counts),), torch.nan)
        if rows is not None and several:
            nc3_classes[present] = (F.normalize(rows, dim=1) - F.normalize(centred, dim=1)).norm(dim=1)
        pairs = torch.pdist(F.normalize(centred, dim=1)) if several else torch.zeros(0)
        dual = rows is not None and several
        return NeuralCollapse(
            nc1=within.sum().item() / divisor if several else UNKNOWN,
            nc1_svd=within[: number - 1].sum().item() / divisor if several else UNKNOWN,
            nc1_quotient=(squares.sum() / counts.sum() / lengths.sum()).item() if several else UNKNOWN,
            cdnv=_cdnv(self.means[present], spread) if several else UNKNOWN,
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
            class_means=self.known,
            global_mean=middle,
            counts=self.counts.clone(),
            absent=tuple((self.counts == 0).nonzero().squeeze(1).tolist()),
        )


def _distance(rows: Tensor, centred: Tensor) -> float:
    return (rows / rows.norm() - centred / centred.norm()).square().sum().item()


def _cdnv(means: Tensor, spread: Tensor) -> float:
    first, second = torch.triu_indices(len(means), len(means), 1)
    apart = torch.pdist(means).square()
    return ((spread[first] + spread[second]) / (2 * apart)).nanmean().item()
