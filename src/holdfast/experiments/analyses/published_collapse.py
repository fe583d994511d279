"""Reading the .npy results that the code of Su et al. (2024) leaves, as rows of our tidy table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

_METRICS = {
    "nc1": "nc1",
    "nc2_activation_norm": "nc2_norm_means",
    "nc2_classifier_norm": "nc2_norm_weights",
    "nc2_activation_angle": "nc2_angle_means",
    "nc2_classifier_angle": "nc2_angle_weights",
    "nc3": "nc3",
    "nc4": "nc4",
}
_TARGETED = {
    "nc1": "nc1",
    "nc2_norm_M": "nc2_norm_means",
    "nc2_norm_W": "nc2_norm_weights",
    "nc2_angle_M": "nc2_angle_means",
    "nc2_angle_W": "nc2_angle_weights",
    "nc3": "nc3",
    "nc4": "nc4",
}
_BETWEEN = {"dist": "distance", "angle": "angle", "dist_abs": "distance_uncentred", "angle_abs": "angle_uncentred"}


def _names() -> dict[str, tuple[str, str]]:
    """By the stem of a file its collection and metric."""
    names = {stem: ("clean", metric) for stem, metric in _METRICS.items()}
    for stem, metric in _METRICS.items():
        kind, _, rest = stem.partition("_")
        names[f"robust_{rest.replace('_', '_nc2_')}" if rest else f"robust_{kind}"] = ("adversarial", metric)
        for prefix, noise in (
            ("gaussian", "noise of l2:128/255"),  # whatever the run's norm
            ("new_gaussian", "Gaussian noise of l2:128/255"),
            ("linf", "noise of linf:8/255"),
        ):
            names[f"{prefix}_label_{stem}"] = (noise, metric)
    names |= {f"targeted_{stem}": ("targeted", metric) for stem, metric in _TARGETED.items()}
    for pair, collection in (("clean_robust", "adversarial"), ("clean_target", "targeted")):
        names |= {f"{pair}_{stem}": (collection, f"{metric}_class") for stem, metric in _BETWEEN.items()}
    for prefix, collection in (("", "adversarial"), ("target_", "targeted")):
        names |= {f"{prefix}muG_{stem}": (collection, f"global_{_BETWEEN[stem]}") for stem in ("dist", "angle")}
    names |= {"train_loss": ("clean", "loss"), "train_robust_loss": ("adversarial", "loss")}
    return names | {"train_acc": ("clean", "accuracy"), "train_robust_acc": ("adversarial", "accuracy")}


NAMES = _names()


def read_published_collapse(folder: Path) -> pd.DataFrame:
    """Columns epoch (from 1), collection, layer, metric, class, value of all files whose names are known.

    NC1 is as they have it, not divided by the number of classes.

    Raises:
        FileNotFoundError: there is no such folder, or no known file in it.
        ValueError: a file holds no series over epochs.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    rows = []
    for path in sorted(folder.glob("*.npy")):
        if path.stem not in NAMES:
            continue
        collection, metric = NAMES[path.stem]
        try:
            values = np.load(path, allow_pickle=False)
        except (OSError, EOFError, ValueError) as fault:
            raise ValueError(f"{path} cannot be read: {fault}") from fault
        if not isinstance(values, np.ndarray) or values.ndim not in (1, 2) or values.dtype.kind not in "fiu":
            raise ValueError(f"{path}: expected numbers over epochs")
        series = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
        for epoch, value in enumerate(series, start=1):
            by_class = enumerate(value.tolist()) if np.ndim(value) else [(None, float(value))]
            rows += [(epoch, collection, "last features", metric, c, v) for c, v in by_class]
    if not rows:
        raise FileNotFoundError(f"{folder} holds none of the known .npy results")
    return pd.DataFrame(rows, columns=["epoch", "collection", "layer", "metric", "class", "value"])
