"""Contact sheet: images, what an attack changed, and what came out."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from holdfast.threat import Threat


def contact_sheet(x: Tensor, x_adv: Tensor, labels: np.ndarray, attack: str, threat: Threat) -> Figure:
    """Three rows: clean images, perturbations stretched to the full range around grey, adversarial images.

    Args:
        x, x_adv: (n, C, H, W) of one or three channels, in the threat's box.
        labels: (n,), above the columns.
    """
    delta = (x_adv - x).cpu()
    largest = delta.flatten(1).abs().amax(1).clamp(min=1e-12).view(-1, 1, 1, 1)
    rows = {"clean": x.cpu(), "change, stretched": 0.5 + delta / largest / 2, "adversarial": x_adv.cpu()}
    figure = Figure(figsize=(1.1 * len(x) + 0.6, 3.9))
    grid = figure.subplots(3, len(x), squeeze=False)
    for row, (title, pictures) in zip(grid, rows.items(), strict=True):
        for column, picture in enumerate(pictures):
            low, high = (0.0, 1.0) if row is grid[1] else (threat.low, threat.high)
            if not np.isfinite([low, high]).all():
                low, high = picture.min().item(), picture.max().item()
            pixels = ((picture - low) / (high - low)).clamp(0, 1).permute(1, 2, 0).numpy()
            row[column].imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            row[column].set(xticks=[], yticks=[])
        row[0].set_ylabel(title, fontsize=8)
    for axes, label, length in zip(grid[0], labels, threat.distance(x.cpu(), x_adv.cpu()), strict=True):
        axes.set_title(f"{label}, at {length.item():.3g}", fontsize=8)
    figure.suptitle(f"{attack} in {threat}: label and distance", fontsize=9)
    return figure
