"""Neural collapse of clean, adversarial, noisy and targeted images, while training and of a trained model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, PositiveInt
from torch import Tensor, nn

from holdfast.analysis.collapse_metrics import Centre, NeuralCollapse
from holdfast.analysis.neural_collapse import neural_collapse
from holdfast.analysis.simplex import compare_simplices, leap_matrix, nearest_centre
from holdfast.draws import Draws
from holdfast.experiments.analyses.analysis import Findings, ModelAnalysis, Subject
from holdfast.experiments.analyses.published_collapse import read_published_collapse
from holdfast.fold import folded
from holdfast.inference import frozen_eval
from holdfast.models.features import LayerOutputs, collect_layers
from holdfast.objectives import Objective, Progress
from holdfast.plots.neural_collapse import collapse_figure, layers_figure, matrices_figure
from holdfast.search import climb
from holdfast.threat import Threat
from holdfast.training import Observer

Collection = Literal[
    "clean", "adversarial", "targeted", "sphere-noise", "sign-noise", "gaussian-noise", "test", "test-adversarial"
]
Row = tuple[str, str, str, int | None, float]
ROW = ["collection", "layer", "metric", "class", "value"]
HEAD = "last features"
"""What the input of the last linear layer is called among the layers; no module is."""


class Images(NamedTuple):
    """A collection: inputs, their labels, and the labels by which its class means are taken."""

    x: Tensor
    y: Tensor
    grouped: Tensor


class NeuralCollapseAnalysis(ModelAnalysis, name="neural-collapse"):
    """NC1 to NC4 of a network's last features on several collections of images, and how their class means lie to
    the clean ones (Papyan et al., 2020; Su et al., 2024).

    While training, the history gets them after every so many epochs, of the images of that epoch as they were
    trained on, augmented: ``adversarial`` are then the very inputs that the objective perturbed them to (images
    that it left alone stand for themselves), measured with the weights that the optimiser left at the epoch's end,
    not with an average of them. Otherwise they come from PGD. ``targeted`` is PGD towards the next class, grouped
    by that class. The noises all have the l_2 length of a vector of equal entries that spends the whole budget of
    the threat, before the box cuts them: on every image as equal steps up or down (which alone keep to an l_inf
    budget) or spread on a sphere, and on average as independent Gaussians. NC1 is divided by the classes.
    """

    every: PositiveInt = 1
    """Epochs between two measurements while training."""
    collections: list[Collection] = ["clean", "adversarial"]
    """What is measured; ``clean`` always is."""
    examples: PositiveInt | None = None
    """Measure so many images; all of an epoch, or all training images, by default. While training they are held in
    memory until the epoch ends."""
    layers: list[Annotated[str, BeforeValidator(str)]] = []
    """Paths of further modules whose outputs are measured, averaged over space."""
    head: str | None = None
    """Path of the module whose input are the last features; the last linear layer by default."""
    steps: PositiveInt = 10
    """Of the PGD where training itself did not perturb, and of the targeted one."""
    centre: Centre = "weighted"
    """What is subtracted from class means: the mean of the images, or of the class means."""
    checkpoints: Literal["last", "all"] = "last"
    """``all`` also measures the weights that training.keep_every left."""
    published: Path | None = None
    """Folder with .npy results of the code of Su et al., drawn beside; their NC1 is divided by the classes here."""

    def watch(
        self, model: nn.Module, objective: Objective, threat: Threat, rate: Callable[[Progress], float]
    ) -> _Watcher:
        return _Watcher(self, model, threat)

    def rehearse(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> None:
        if only := [name for name in self.collections if name.startswith("test")]:
            raise ValueError(
                f"neural-collapse: no test images are seen while training: leave out {', '.join(only)}"
            )
        y = y.argmax(1) if y.is_floating_point() else y
        self.measure(model, dict(self.images(model, {"clean": (x, y)}, threat)))

    def table(self, history: list[dict[str, Any]]) -> pd.DataFrame | None:
        measured = [record for record in history if isinstance(record.get("neural_collapse"), list)]
        rows = [(record["epoch"], *row) for record in measured for row in record["neural_collapse"]]
        return pd.DataFrame(rows, columns=["epoch", *ROW]) if rows else None

    def of(self, subject: Subject) -> Findings:
        train, test = subject.train.batch(slice(self.examples)), (subject.x, subject.y)
        known = {"clean": train, "test": (test[0][: self.examples], test[1][: self.examples])}
        published = read_published_collapse(self.published) if self.published else None
        model, parts = subject.model, []
        for epoch, state in subject.kept.items() if self.checkpoints == "all" else ():
            if epoch == subject.epoch:
                continue  # the final weights
            with _weights(model, state):
                rows, _ = self.measure(model, dict(self.images(model, known, subject.threat)))
            parts.append(pd.DataFrame([(epoch, *row) for row in rows], columns=["epoch", *ROW]))
        rows, matrices = self.measure(model, dict(self.images(model, known, subject.threat)), matrices=True)
        final = pd.DataFrame([(subject.epoch, *row) for row in rows], columns=["epoch", *ROW])
        curves = [part.assign(run=subject.title) for part in (*parts, final)] if parts else []
        for title, history in subject.histories.items():
            recorded = self.table(history)
            if recorded is not None and not (parts and title == subject.title):
                curves.append(recorded.assign(run=title))
        if published is not None:
            published.loc[published["metric"] == "nc1", "value"] /= len(subject.train.classes)
            curves.append(published.assign(run="published", layer=HEAD))
        tables = {"collapse": pd.concat([*parts, final], ignore_index=True)}
        figures: dict[str, tuple[Callable[[pd.DataFrame], Any], str]] = {}
        if matrices:
            tables["matrices"] = pd.DataFrame(matrices)
            figures["matrices"] = (matrices_figure, "matrices")
        if curves:
            tables["curves"] = pd.concat(curves, ignore_index=True)
            figures["curves"] = (partial(collapse_figure, layer=HEAD), "curves")
        if self.layers:
            tables["layers"] = final
            figures["layers"] = (partial(layers_figure, order=[*self.layers, HEAD]), "layers")
        return Findings(list(_summary(final)), tables, figures)

    def images(
        self, model: nn.Module, known: dict[str, tuple[Tensor, Tensor]], threat: Threat
    ) -> Iterator[tuple[str, Images]]:
        """The collections, in order: those that are known, and what follows from the clean images."""
        x, y = known["clean"]
        yield "clean", Images(x, y, y)
        classes = _number_of_classes(model, x)
        for name in self.collections:
            if name == "clean":
                continue
            if name in known:
                images, labels = known[name]
                yield name, Images(images, labels, labels)
            elif name == "targeted":
                target = (y + 1) % classes
                yield name, Images(_towards(model, x, y, target, threat, self.steps), y, target)
            elif name.endswith("adversarial"):
                of, labels = known["test" if name.startswith("test") else "clean"]
                yield name, Images(_against(model, of, labels, threat, self.steps), labels, labels)
            elif name.endswith("noise"):
                yield name, Images(noisy(x, threat, name), y, y)

    def measure(
        self, model: nn.Module, collections: dict[str, Images], *, matrices: bool = False
    ) -> tuple[list[Row], list[dict[str, Any]]]:
        """Rows of the tidy table, and those of the matrices between collections."""
        rows: list[Row] = []
        between: list[dict[str, Any]] = []
        clean: dict[str, NeuralCollapse] = {}
        for name, images in collections.items():
            with frozen_eval(model):
                asked = model if self.layers or self.head else folded(model, images.x[:2])
                outputs = collect_layers(asked, images.x, self.layers, head=self.head)
            for layer, (features, found) in self._of_layers(outputs, images).items():
                clean.setdefault(layer, found)
                values: list[tuple[str, int | None, float]] = [(key, None, v) for key, v in found.scalars.items()]
                values += [("nc3_class", c, v) for c, v in enumerate(found.nc3_classes.tolist())]
                values += list(_beside(found, clean[layer], features, images))
                rows += [(name, layer, metric, c, v) for metric, c, v in values if not math.isnan(v)]
                if matrices and layer == HEAD:
                    between += _matrices(name, found, clean[layer], features, images)
        return rows, between

    def _of_layers(self, outputs: LayerOutputs, images: Images) -> dict[str, tuple[Tensor, NeuralCollapse]]:
        """By layer its features and their metrics; the classifier belongs to the last."""
        head = outputs.head
        weight, bias = (head.weight, head.bias) if isinstance(head, nn.Linear) else (None, None)
        measured = partial(neural_collapse, num_classes=outputs.logits.shape[1], centre=self.centre)
        found = {HEAD: (outputs.features, measured(outputs.features, images.grouped, weight, bias))}
        for layer, features in outputs.layers.items():
            found[layer] = features, measured(features, images.grouped)
        return found


class _Watcher(Observer):
    """Keeps the images of an epoch, and what they were perturbed to, and measures them at its end."""

    def __init__(self, analysis: NeuralCollapseAnalysis, model: nn.Module, threat: Threat) -> None:
        self.analysis, self.model, self.threat = analysis, model, threat
        self.kept: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.room: float = 0

    def begin(self, epoch: int, seen: Sequence[dict[str, Any]]) -> None:
        most = (self.analysis.examples or math.inf) if epoch % self.analysis.every == 0 else 0
        self.kept = [part for state in seen for part in state["kept"]]
        self.room = most - sum(len(y) for _, y, _ in self.kept)

    def state(self) -> dict[str, Any]:
        return {"kept": self.kept}

    def observe(self, x: Tensor, y: Tensor, x_adv: Tensor | None, progress: Progress) -> None:
        if self.room > 0:
            first = slice(int(min(len(x), self.room)))
            perturbed = None if x_adv is None else x_adv[first].detach().clone()
            self.kept.append((x[first].clone(), y[first].clone(), perturbed))
            self.room -= len(x)

    def record(self) -> dict[str, Any]:
        """The headline numbers of the last features, and all rows under ``neural_collapse``."""
        kept, self.kept = self.kept, []
        if not kept:
            return {}
        known = {"clean": _joined([(x, y) for x, y, _ in kept])}
        if any(x_adv is not None for _, _, x_adv in kept):  # what was not perturbed was trained on as it is
            known["adversarial"] = _joined([(x if x_adv is None else x_adv, y) for x, y, x_adv in kept])
        collections = dict(self.analysis.images(self.model, known, self.threat))
        rows, _ = self.analysis.measure(self.model, collections)
        shown = ("nc1", "nc2_norm_means", "nc2_angle_means", "nc3", "nc4")
        headline = {f"{row[0]}_{row[2]}": row[4] for row in rows if row[1] == HEAD and row[2] in shown}
        return {**headline, "neural_collapse": [list(row) for row in rows]}


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    x, y = (torch.cat(part) for part in zip(*parts, strict=True))
    return x, y.argmax(1) if y.is_floating_point() else y  # smoothed, or mixed: the larger part


def noisy(x: Tensor, threat: Threat, kind: str, seed: int = 0) -> Tensor:
    """Images with random noise of the threat's budget, cut to its box.

    A vector of equal entries whose threat norm is eps has some l_2 length: ``sign-noise`` is that vector with
    random signs, ``sphere-noise`` a random direction of that length, ``gaussian-noise`` independent normal numbers
    of that length on average.

    Raises:
        ValueError: in l_0, where no vector of equal entries spends a budget.
    """
    if threat.norm == "l0":
        raise ValueError(f"neural-collapse: {kind} has no size in l_0; leave it out")
    size = x[0].numel()
    noise = Draws.of(seed, range(len(x)), 61).normal(size).to(x).view_as(x)
    entry = threat.eps / threat.distance(torch.zeros_like(x[:1]), torch.ones_like(x[:1])).item()
    if kind == "sign-noise":
        noise = noise.sign()
    elif kind == "sphere-noise":
        noise = noise * (math.sqrt(size) / noise.flatten(1).norm(dim=1)).view(-1, *[1] * (x.dim() - 1))
    return (x + entry * noise).clamp(threat.low, threat.high)


def _against(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, steps: int) -> Tensor:
    """The last points of PGD on the cross-entropy, whatever the model answers."""
    return _last_points(model, x, y, threat, steps, 1.0)


def _towards(model: nn.Module, x: Tensor, y: Tensor, target: Tensor, threat: Threat, steps: int) -> Tensor:
    """The last points of PGD that descends the cross-entropy of another class."""
    return _last_points(model, x, target, threat, steps, -1.0)


def _last_points(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, steps: int, sign: float) -> Tensor:
    parts = []
    with frozen_eval(model):
        copy = folded(model, x[:2])
        for rows in torch.arange(len(x), device=x.device).split(256):

            def loss(points: Tensor, chosen: Tensor, labels: Tensor = y[rows]) -> tuple[Tensor, None]:
                return sign * F.cross_entropy(copy(points), labels[chosen], reduction="none"), None

            start = threat.random_point(x[rows], Draws.of(0, rows, 62))
            length = threat.eps * min(1.0, 2.5 / steps)
            parts.append(climb(loss, x[rows], threat, steps=steps, step_size=length, start=start))
    return torch.cat(parts)


def _number_of_classes(model: nn.Module, x: Tensor) -> int:
    with frozen_eval(model), torch.no_grad():
        return int(model(x[:1].clone()).shape[1])


def _beside(
    found: NeuralCollapse, clean: NeuralCollapse, features: Tensor, images: Images
) -> Iterator[tuple[str, int | None, float]]:
    """How a collection lies to the clean one."""
    if found is clean:
        return
    compared = compare_simplices(clean.class_means, found.class_means)
    yield "global_distance", None, compared.global_distance
    yield "global_angle", None, compared.global_angle
    for name in ("distance", "angle", "distance_uncentred", "angle_uncentred"):
        values = getattr(compared, name)
        yield name, None, values.nanmean().item()
        yield from ((f"{name}_class", c, value) for c, value in enumerate(values.tolist()))
    nearest = nearest_centre(features, clean.class_means)
    yield "ncc_accuracy_clean_centres", None, (nearest == images.y).double().mean().item()
    if not torch.equal(images.y, images.grouped):
        yield "on_target", None, (nearest == images.grouped).double().mean().item()


def _matrices(
    name: str, found: NeuralCollapse, clean: NeuralCollapse, features: Tensor, images: Images
) -> list[dict[str, Any]]:
    """Leaps, true class by nearest clean centre, and angles between class means, by clean class."""
    leaps = leap_matrix(features, images.y, clean.class_means).double()
    leaps = leaps / leaps.sum(1, keepdim=True)  # NaN for a class without images
    means = found.class_means, clean.class_means
    both = torch.isfinite(means[0] + means[1]).all(1)
    unit = [m - m[both].mean(0) for m in means]
    first, second = (F.normalize(m, dim=1) for m in unit)
    apart, together = ((first[:, None] + sign * second).norm(dim=2) for sign in (-1, 1))
    angles = torch.rad2deg(2 * torch.atan2(apart, together))
    return [
        {"collection": name, "matrix": title, "row": i, "column": j, "value": value}
        for title, matrix in (("leap", leaps), ("angle", angles))
        for i, line in enumerate(matrix.tolist())
        for j, value in enumerate(line)
    ]


def _summary(final: pd.DataFrame) -> Iterator[tuple[str, str]]:
    shown = ("nc1", "nc2_norm_means", "nc2_angle_means", "nc3", "nc4", "ncc_accuracy", "ncc_accuracy_clean_centres")
    rows = final[(final["layer"] == HEAD) & final["class"].isna()]
    for name, part in rows.groupby("collection", sort=False):
        values = part.set_index("metric")["value"]
        words = [f"{metric} {values[metric]:.4g}" for metric in (*shown, "angle", "on_target") if metric in values]
        yield str(name), ", ".join(words)


@contextlib.contextmanager
def _weights(model: nn.Module, state: dict[str, Tensor] | None) -> Iterator[None]:
    """Inside, the model has other weights."""
    if state is None:
        yield
        return
    own = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    try:
        yield
    finally:
        model.load_state_dict(own)
