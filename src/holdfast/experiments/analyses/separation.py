"""How far apart the classes of a data set are, and which examples stand in between."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import PositiveInt
from torch import Tensor

from holdfast.analysis.separation import separation
from holdfast.data import Images
from holdfast.experiments.analyses.analysis import DataAnalysis, Findings
from holdfast.listeners import Reporter
from holdfast.plots.separation import distances_figure, pairs_figure
from holdfast.threat import Threat

PARTS = ("train", "test")


class SeparationAnalysis(DataAnalysis, name="separation"):
    """The distance of each image to the nearest training image of another class, in the threat's norm (Yang et al.,
    2020): where all exceed 2 eps, some classifier is right on every ball of radius eps."""

    examples: PositiveInt | None = None
    """The first so many images of each part; all by default."""
    pairs: PositiveInt = 20
    """Closest pairs that are listed, of each part; the first ten are drawn."""
    exclude: Path | None = None
    """A CSV file with the columns part (train or test), index, reason: images that are left out, and why."""
    memory: PositiveInt = 256
    """MiB that the distances of one portion may take."""

    def of(self, train: Images, test: Images, threat: Threat, reporter: Reporter) -> Findings:
        left_out = self._excluded(train, test)
        x, y = train.batch(slice(None))
        others = _without(len(train), left_out, "train")
        if not len(others):
            raise ValueError(f"{self.exclude} leaves no training image")
        tables, pairs = [], []
        for part, images in (("train", train), ("test", test)):
            mine = _without(len(images), left_out, part)[: self.examples]
            queries, labels = images.batch(mine)
            found = separation(
                x[others],
                y[others],
                threat.norm,
                queries=queries,
                query_labels=labels,
                memory=self.memory * 2**20,
                on_progress=partial(reporter.work, f"{part} – train"),
            )
            frame = pd.DataFrame(
                {
                    "part": part,
                    "index": mine.numpy(),
                    "label": labels.numpy(),
                    "distance": found.distance.numpy(),
                    "neighbour": np.where(found.neighbour >= 0, others[found.neighbour].numpy(), -1),
                    "neighbour_label": np.where(found.neighbour >= 0, y[others[found.neighbour]].numpy(), -1),
                }
            )
            tables.append(frame)
            pairs.append(_closest(frame, self.pairs, images, x, y, others, threat))
        distances, closest = pd.concat(tables, ignore_index=True), pd.concat(pairs, ignore_index=True)
        repeated = _repeated(train, test)
        pictures = [
            (x[j], (x if part == "train" else test.batch([i])[0])[i if part == "train" else 0])
            for part, i, j in zip(closest["part"], closest["index"], closest["neighbour"], strict=True)
        ]
        figures: dict[str, tuple[Callable[[pd.DataFrame], Any], str]] = {
            "distances": (partial(distances_figure, threat=threat), "distances"),
        }
        if len(pictures) and x.shape[1] in (1, 3):
            figures["pairs"] = (partial(pairs_figure, pictures=pictures, classes=train.classes), "pairs")
        named = {"distances": distances, "pairs": closest, "repeated": repeated}
        if len(left_out):
            named["excluded"] = left_out
        return Findings(list(self._summary(distances, closest, repeated, left_out, threat)), named, figures)

    def _summary(
        self,
        distances: pd.DataFrame,
        closest: pd.DataFrame,
        repeated: pd.DataFrame,
        left_out: pd.DataFrame,
        threat: Threat,
    ) -> list[tuple[str, str]]:
        lines = []
        for part, frame in distances.groupby("part", sort=False):
            found = frame["distance"]
            within = f"; {int((found <= 2 * threat.eps * (1 + 1e-6)).sum())} within 2 eps" if threat.eps else ""
            text = f"min {found.min():.4g}, mean {found.mean():.4g} of {len(found)}{within}"
            lines.append((f"{part} – train, {threat.norm}", text))
        between = sum("own class" in note for note in closest["note"])
        both = int(repeated["labels_differ"].sum())
        lines.append(("images that occur more than once", f"{len(repeated)}, {both} of them under two labels"))
        lines.append((f"of the {len(closest)} closest", f"{between} nearer to another class than to their own"))
        if len(left_out):
            lines.append(("left out", f"{len(left_out)}, as {self.exclude} says"))
        return lines

    def _excluded(self, train: Images, test: Images) -> pd.DataFrame:
        """The list of what is left out, checked."""
        if self.exclude is None:
            return pd.DataFrame({"part": [], "index": [], "reason": []})
        listed = pd.read_csv(self.exclude)
        if list(listed.columns) != ["part", "index", "reason"]:
            raise ValueError(
                f"{self.exclude}: expected columns part,index,reason, found {','.join(listed.columns)}"
            )
        for row, (part, index, reason) in enumerate(listed.itertuples(index=False), start=2):
            if part not in PARTS:
                raise ValueError(f"{self.exclude}, line {row}: {part!r} is neither train nor test")
            size = len(train if part == "train" else test)
            if not isinstance(index, int) or not 0 <= index < size:
                raise ValueError(f"{self.exclude}, line {row}: {index} is not one of 0 to {size - 1}")
            if not isinstance(reason, str) or not reason.strip():
                raise ValueError(f"{self.exclude}, line {row}: without a reason nothing is left out")
        return listed.drop_duplicates(["part", "index"], ignore_index=True)


def _without(count: int, left_out: pd.DataFrame, part: str) -> Tensor:
    """The numbers of a part that are not left out."""
    kept = torch.ones(count, dtype=torch.bool)
    named = left_out.loc[left_out["part"] == part, "index"].to_numpy(dtype=np.int64)
    kept[torch.from_numpy(named[named < count])] = False
    return kept.nonzero().squeeze(1)


def _closest(
    frame: pd.DataFrame, count: int, images: Images, x: Tensor, y: Tensor, others: Tensor, threat: Threat
) -> pd.DataFrame:
    """The closest pairs of a part; of both images how near their own class is, and what follows."""
    near = frame[np.isfinite(frame["distance"])].nsmallest(2 * count, "distance").copy()
    if (near["part"] == "train").all():  # each pair once
        ends = np.sort(near[["index", "neighbour"]].to_numpy(), axis=1)
        near = near[~pd.DataFrame(ends, index=near.index).duplicated()]
    near = near.head(count)
    own, neighbours_own = [], []
    for row in near.itertuples():
        itself = row.index if row.part == "train" else -1
        own.append(_to_own_class(images.batch([row.index])[0][0], row.label, itself, x, y, others, threat))
        neighbours_own.append(
            _to_own_class(x[row.neighbour], row.neighbour_label, row.neighbour, x, y, others, threat)
        )
    near["own_class"], near["neighbours_own_class"] = own, neighbours_own
    near["note"] = [_note(row) for row in near.itertuples()]
    return near


def _to_own_class(
    image: Tensor, label: int, itself: int, x: Tensor, y: Tensor, others: Tensor, threat: Threat
) -> float:
    """The distance of an image to the nearest other training image of its class."""
    same = others[(y[others] == label) & (others != itself)]
    if not len(same):
        return float("inf")
    return float(threat.distance(image.expand_as(x[same]), x[same]).min())


def _note(row: Any) -> str:
    """What a close pair suggests."""
    if row.distance == 0:
        return "the same image under two labels"
    parts = []
    if row.own_class > row.distance:
        parts.append(f"{row.index} is nearer to the other than to its own class: mislabelled?")
    if row.neighbours_own_class > row.distance:
        parts.append(f"neighbour {row.neighbour} is nearer to the other than to its own class: mislabelled?")
    return "; ".join(parts)


def _repeated(train: Images, test: Images) -> pd.DataFrame:
    """Images that occur more than once in both parts together, pixel by pixel."""
    seen: dict[bytes, list[tuple[str, int, int]]] = {}
    for part, images in zip(PARTS, (train, test), strict=True):
        for first in range(0, len(images), 1000):
            x, y = images.batch(slice(first, first + 1000))
            for number, (image, label) in enumerate(zip(x.numpy(), y.tolist(), strict=True)):
                seen.setdefault(image.tobytes(), []).append((part, first + number, label))
    rows = [
        {
            "group": group,
            "part": part,
            "index": index,
            "label": label,
            "labels_differ": len({w[2] for w in where}) > 1,
        }
        for group, where in enumerate(where for where in seen.values() if len(where) > 1)
        for part, index, label in where
    ]
    return pd.DataFrame(rows, columns=["group", "part", "index", "label", "labels_differ"]).astype(
        {"labels_differ": bool}
    )
