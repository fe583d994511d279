"""Lipschitz constants of a trained network, layer by layer."""

from __future__ import annotations

import pandas as pd
from pydantic import PositiveInt

from holdfast.analysis.lipschitz import network_constant
from holdfast.experiments.analyses.analysis import Findings, ModelAnalysis, Subject
from holdfast.plots.lipschitz import constants_figure


class LipschitzAnalysis(ModelAnalysis, name="lipschitz"):
    """The verified bound of every layer's constant in l_2, and the largest singular value that a search finds."""

    batch: PositiveInt = 16
    """Test images at which the search looks."""

    def of(self, subject: Subject) -> Findings:
        found = network_constant(subject.model, subject.x[: self.batch], subject.threat)
        table = pd.DataFrame([vars(layer) for layer in found.layers])
        summary = [
            (f"{layer.path} {layer.kind}", f"verified {layer.verified:.6f}, found {layer.found:.6f}")
            for layer in found.layers
        ]
        summary.append(("the whole network", f"verified {found.verified:.6f}, found {found.found:.6f}"))
        whole = pd.DataFrame([{"path": "", "kind": "network", "verified": found.verified, "found": found.found}])
        return Findings(
            summary,
            {"layers": table, "network": whole},
            {"layers": (constants_figure, "layers")},
        )
