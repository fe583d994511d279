"""Models that nobody trained here: known by their weights and by what they answer."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from holdfast.files import whole_file, write_json
from holdfast.inference import device_of, fingerprint, frozen_eval, predict
from holdfast.models import Model

PROBES = 64
"""Images whose logits are stored, at most."""
ALIKE = 1e-3
"""Share of the spread of the stored logits by which others may differ: devices differ in the last bits."""


def folder_of(model: nn.Module, runs: Path) -> Path:
    """The folder that is, or will be, about this model.

    Named by its weights; where the model there has the same weights but answers otherwise, since its code was
    edited, the next one.
    """
    name = fingerprint(model)[:12]
    for number in itertools.count(1):
        folder = runs / (name if number == 1 else f"{name}-{number}")
        if not (folder / "model.json").is_file() or _answers_alike(folder, model):
            return folder
    raise AssertionError


def write(folder: Path, model: nn.Module, images: Tensor, classes: int, seed: int) -> None:
    """Leave in the folder by what the model is known.

    Args:
        seed: of what its factory may have drawn.
    """
    images = images[:PROBES]
    known = {"weights": fingerprint(model), "input_shape": list(images.shape[1:]), "num_classes": classes}
    known["seed"] = seed
    with whole_file(folder / "probes.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, images=images.cpu().numpy(), logits=_answers(model, images).cpu().numpy())
    write_json(folder / "model.json", known)


def rebuild(folder: Path, component: Model) -> nn.Module:
    """The model that the folder is about, in eval mode on the CPU, built again by its recipe.

    Raises:
        ValueError: what is built is another one: its weights or its code have changed.
    """
    known = shape_of(folder)
    with torch.random.fork_rng():
        torch.manual_seed(known["seed"])
        model = component.build(tuple(known["input_shape"]), known["num_classes"]).eval()
    if fingerprint(model) != known["weights"] or not _answers_alike(folder, model):
        raise ValueError(f"the model that {folder} is about has changed: evaluate it anew by what it is called")
    return model


def shape_of(folder: Path) -> dict[str, Any]:
    """What ``model.json`` says.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / "model.json"
    try:
        known = json.loads(path.read_text("utf-8"))
    except ValueError as fault:
        raise ValueError(f"{path} cannot be read: {fault}") from fault
    wanted = {"weights", "input_shape", "num_classes", "seed"}
    if not isinstance(known, dict) or not wanted <= set(known):
        raise ValueError(f"{path} cannot be read: it is not about a model")
    return known


def _answers_alike(folder: Path, model: nn.Module) -> bool:
    """Whether the model gives the logits that are stored, or answers at random."""
    with np.load(folder / "probes.npz", allow_pickle=False) as file:
        images, logits = torch.from_numpy(file["images"]), torch.from_numpy(file["logits"])
    found = _answers(model, images).cpu()
    if found.shape != logits.shape:
        return False
    room = ALIKE * (logits.max() - logits.min())
    if (found - logits).abs().max() <= room:
        return True
    return bool((_answers(model, images).cpu() - found).abs().max() > room)


def _answers(model: nn.Module, images: Tensor) -> Tensor:
    with frozen_eval(model):
        return predict(model, images.to(device_of(model))).float()
