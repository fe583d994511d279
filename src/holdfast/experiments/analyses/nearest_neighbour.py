"""The nearest-neighbour classifier of a data set in the sandwich: accurate and robust where classes are apart."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import PositiveInt, PrivateAttr
from torch import Tensor, nn

from holdfast.attacks.attack import MinimumNormAttack, Nearest, Targets
from holdfast.certify.nearest_neighbour import NearestNeighbourCertifier
from holdfast.data import Images
from holdfast.evaluation import evaluate
from holdfast.experiments.analyses.analysis import DataAnalysis, Findings
from holdfast.listeners import Reporter
from holdfast.models.nearest_neighbour import NearestNeighbour
from holdfast.plots.separation import radii_figure
from holdfast.threat import Threat


class NearestNeighbourAnalysis(DataAnalysis, name="nearest-neighbour"):
    """The classifier by distances to the training images, certified and attacked: on separated data it is accurate
    and robust (Yang et al., 2020)."""

    examples: PositiveInt = 200
    """The first so many images of the part."""
    part: Literal["test", "train"] = "test"
    """Images that it is asked about."""
    train_size: PositiveInt | None = None
    """Distances to the first so many training images; to all by default."""

    def of(self, train: Images, test: Images, threat: Threat, reporter: Reporter) -> Findings:
        model = NearestNeighbour(*train.batch(slice(self.train_size)), threat.norm)
        x, y = (test if self.part == "test" else train).batch(slice(self.examples))
        attack, certifier = TowardsNeighbour().attacking(model), NearestNeighbourCertifier()
        evaluation = evaluate(
            model,
            x,
            y,
            threat,
            [attack],
            [certifier],
            attack_certified=True,
            on_progress=lambda name, standing, left: reporter.stage(f"{name}: {standing} of {len(y)} stand"),
        )
        table, counts = evaluation.table, evaluation.summary["counts"]
        found = table.loc[table["correct"], [f"{certifier.name}.radius", f"{attack.name}.distance"]]
        table = table.rename(columns={f"{certifier.name}.radius": "certified", f"{attack.name}.distance": "found"})
        summary = [
            (f"standard, {len(y)} {self.part} images", str(counts["standard"])),
            (f"attacked, {threat}", str(counts["attacked"][attack.name])),
            (f"certified, {threat}", str(counts["certified"][certifier.name])),
            ("mean radius of those right", " ≤ truth ≤ ".join(f"{value:.4g}" for value in found.mean())),
            ("Lipschitz constant of each logit", "1, by construction"),
        ]
        return Findings(summary, {"examples": table}, {"radii": (radii_figure, "examples")})


class TowardsNeighbour(MinimumNormAttack):
    """The nearest point, by bisection of the radius, of the projections of rivals' examples onto balls around x."""

    name: ClassVar[str] = "towards-neighbour"
    rivals: PositiveInt = 3
    """Nearest examples of so many other classes."""
    bisections: PositiveInt = 14
    """Halvings of the radius for each."""
    folds: ClassVar[bool] = False
    _known: NearestNeighbour = PrivateAttr()

    def attacking(self, model: NearestNeighbour) -> TowardsNeighbour:
        """The same, with the examples of this classifier."""
        attack = self.model_copy()
        attack._known = model
        return attack

    def minimise(self, model: nn.Module, targets: Targets, threat: Threat, nearest: Nearest) -> None:
        x, y = targets.x, targets.y
        count = min(self.rivals, targets.logits.shape[1] - 1)
        others = targets.logits.scatter(1, y[:, None], -torch.inf).topk(count, 1).indices
        for number, rival in enumerate(others.unbind(1)):
            goal = self._example(x, rival)
            low, high = torch.zeros_like(nearest.distance), threat.distance(x, goal)
            nearest.offer(goal, model(goal).argmax(1) != y, 0, number)
            for step in range(1, self.bisections + 1):
                radius = (low + high) / 2
                points = threat.project(x, goal, radius)
                wrong = model(points).argmax(1) != y
                nearest.offer(points, wrong, step, number)
                low, high = torch.where(wrong, low, radius), torch.where(wrong, radius, high)
        nearest.count(count * (1 + self.bisections), 0)

    def _example(self, x: Tensor, labels: Tensor) -> Tensor:
        """The nearest example of the class for each input."""
        known, flat = self._known, x.flatten(1)
        rows = [
            known.nearest(flat[i : i + 1], known.points.flatten(1), label)
            for i, label in enumerate(labels.tolist())
        ]
        return known.points[torch.cat(rows)]
