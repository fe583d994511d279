"""Local Lipschitz constants of a trained network, beside its margins."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
import torch
from pydantic import PositiveInt

from holdfast.analysis import local_lipschitz
from holdfast.experiments.analyses.analysis import Findings, ModelAnalysis, Subject
from holdfast.inference import predict
from holdfast.plots.local_lipschitz import quotient_figure


class LocalLipschitzAnalysis(ModelAnalysis, name="local-lipschitz"):
    """The largest ‖f(x') − f(x)‖ / ‖x' − x‖ that ascent finds around each test image (Yang et al., 2020)."""

    examples: PositiveInt = 200
    """The first so many test images."""
    on: Literal["logits", "probabilities", "margins"] = "logits"
    """What is measured."""
    output_norm: Literal[1, 2] = 1
    """The norm above the line."""
    steps: PositiveInt = 50
    """Gradient steps of a restart."""
    restarts: PositiveInt = 5
    """Starts for each image; the time grows in proportion, and one alone can end far below the largest quotient."""

    def of(self, subject: Subject) -> Findings:
        x, y = subject.x[: self.examples], subject.y[: self.examples]
        settings = {"on": self.on, "output_norm": self.output_norm, "steps": self.steps, "restarts": self.restarts}
        found = local_lipschitz(subject.model, x, subject.threat, **settings)  # type: ignore[arg-type]
        assert found.first_order is not None
        logits = predict(subject.model, x)
        own = torch.nn.functional.one_hot(y, logits.shape[1]).bool()
        table = pd.DataFrame(
            {
                "index": range(len(x)),
                "margin": (logits[own] - logits.masked_fill(own, -torch.inf).amax(1)).tolist(),
                "radius": _radii(subject.examples, len(x)),
                "quotient": found.value.tolist(),
                "first_order": found.first_order.tolist(),
                "upper": [float("nan")] * len(x) if found.upper is None else found.upper.tolist(),
            }
        )
        if not table["radius"].notna().any():
            del table["radius"]
        mean, worst = table["quotient"].mean(), table["quotient"].max()
        upper = "unknown" if found.upper is None else f"{table['upper'].max():.4g}"
        summary = [
            (f"largest quotient found, {len(x)} images", f"mean {mean:.4g}, max {worst:.4g}"),
            ("first order, at the images", f"mean {table['first_order'].mean():.4g}"),
            ("certified from above", upper),
        ]
        return Findings(summary, {"quotients": table}, {"quotients": (quotient_figure, "quotients")})


def _radii(examples: pd.DataFrame | None, count: int) -> np.ndarray:
    """The largest radius certified for each of the first images; NaN where there is none."""
    radii = np.full(count, np.nan)
    if examples is not None:
        columns = [name for name in examples.columns if name.endswith(".radius")]
        known = examples.head(count)
        if columns:
            radii[: len(known)] = known[columns].max(axis=1)
    return radii
