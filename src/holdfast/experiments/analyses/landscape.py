"""The loss landscape of certified training, while training and of a trained model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from pydantic import PositiveInt
from torch import Tensor, nn

from holdfast.analysis.loss_landscape import label, loss_landscape, relaxation_tightness, relaxed_margins
from holdfast.bounds import BoundMethod, bound_margins, region_of, robust_cross_entropy
from holdfast.experiments.analyses.analysis import Findings, ModelAnalysis, Subject
from holdfast.objectives import Objective, Progress
from holdfast.plots.landscape import band_figure, violin_figure
from holdfast.threat import Threat
from holdfast.training import Observer

RELAXATIONS = (
    BoundMethod(method="ibp"),
    BoundMethod(method="crown-ibp", intersect=False),
    BoundMethod(method="crown-ibp", relaxation="same-slope", intersect=False),
    BoundMethod(method="crown-ibp", relaxation="zero", intersect=False),
    BoundMethod(method="crown-ibp", relaxation="one", intersect=False),
    BoundMethod(method="crown-ibp", relaxation="random", intersect=False),
    BoundMethod(method="one-step", intersect=False),
)


class LandscapeAnalysis(ModelAnalysis, name="landscape"):
    """How a certified loss varies along its own gradient step, and how tight each relaxation is.

    While training, every so many steps the training loss is probed along a plain gradient step; the history gets
    its smallest and largest value, gradient similarity and effective smoothness, as means over the epoch.
    """

    every: PositiveInt = 100
    """Steps between two probes."""
    batch: PositiveInt = 128
    """Test images that a trained model is probed on."""

    def watch(
        self, model: nn.Module, objective: Objective, threat: Threat, rate: Callable[[Progress], float]
    ) -> _Probe:
        return _Probe(self.every, model, objective, threat, rate)

    def of(self, subject: Subject) -> Findings:
        x, y, threat = subject.x[: self.batch], subject.y[: self.batch], subject.threat
        rows = []
        for method in RELAXATIONS:
            settings = {name: getattr(method, name) for name in ("relaxation", "intersect")}

            def loss(probe: nn.Module, method: BoundMethod = method, settings: dict = settings) -> Tensor:
                margins = bound_margins(probe, x, y, threat, method.method, **settings)
                return robust_cross_entropy(margins).mean()

            linear = partial(_coefficients, x=x, y=y, threat=threat, method=method)
            found = loss_landscape(
                subject.model, loss, subject.lr, coefficients=None if method.method == "ibp" else linear
            )
            flips = np.full(len(found.points), np.nan) if found.flips is None else found.flips.numpy()
            rows.append(
                pd.DataFrame(
                    {
                        "relaxation": label(method),
                        "t": found.points.numpy(),
                        "loss": found.loss.numpy(),
                        "gradient_distance": found.gradient_distance.numpy(),
                        "cosine": found.cosine.numpy(),
                        "flips": flips,
                        "smoothness": found.smoothness,
                    }
                )
            )
        step = pd.concat(rows, ignore_index=True)
        tightness = relaxation_tightness(subject.model, x, y, threat, RELAXATIONS)
        summary = [
            (
                str(name),
                f"loss {part['loss'].iloc[0]:.3f}, varies by {part['loss'].max() - part['loss'].min():.3f}, "
                f"smoothness {part['smoothness'].iloc[0]:.3g}",
            )
            for name, part in step.groupby("relaxation", sort=False)
        ]
        tables = {"landscape": step, "tightness": tightness}
        figures: dict[str, tuple[Callable[[pd.DataFrame], Any], str]] = {"tightness": (violin_figure, "tightness")}
        bands = [
            {"run": name, "epoch": record["epoch"], **_band(record)}
            for name, history in subject.histories.items()
            for record in history
            if "landscape_loss_low" in record
        ]
        if bands:
            tables["band"] = pd.DataFrame(bands)
            figures["band"] = (band_figure, "band")
        return Findings(summary, tables, figures)


def _coefficients(probe: nn.Module, x: Tensor, y: Tensor, threat: Threat, method: BoundMethod) -> Tensor:
    return relaxed_margins(probe, y, region_of(x, threat), x, method).coefficients


def _band(record: dict[str, float]) -> dict[str, float]:
    return {
        name.removeprefix("landscape_"): value for name, value in record.items() if name.startswith("landscape_")
    }


class _Probe(Observer):
    """Probes the training loss every so many steps."""

    def __init__(
        self,
        every: int,
        model: nn.Module,
        objective: Objective,
        threat: Threat,
        rate: Callable[[Progress], float],
    ) -> None:
        self.every, self.model, self.objective, self.threat, self.rate = every, model, objective, threat, rate
        self.found: list[dict[str, float]] = []

    def begin(self, epoch: int, seen: Sequence[dict[str, Any]]) -> None:
        self.found = [one for state in seen for one in state["found"]]

    def state(self) -> dict[str, Any]:
        return {"found": self.found}

    def observe(self, x: Tensor, y: Tensor, x_adv: Tensor | None, progress: Progress) -> None:
        lr = self.rate(progress)
        if progress.step % self.every or lr <= 0:
            return
        landscape = loss_landscape(
            self.model, lambda probe: self.objective.loss(probe, x, y, self.threat, progress).total, lr
        )
        self.found.append(
            {
                "landscape_loss_low": landscape.loss.min().item(),
                "landscape_loss_high": landscape.loss.max().item(),
                "landscape_cosine": landscape.cosine.min().item(),
                "landscape_gradient_distance": landscape.gradient_distance.max().item(),
                "landscape_smoothness": landscape.smoothness,
            }
        )

    def record(self) -> dict[str, float]:
        found = self.found
        return {name: float(np.mean([one[name] for one in found])) for name in found[0]} if found else {}
