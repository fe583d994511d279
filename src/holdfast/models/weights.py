"""Weights from files, our own and those of the original studies, matched by key and shape."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

NESTED = ("state_dict", "model_state_dict", "model", "net", "network")
"""Where checkpoints of other programs keep the weights."""
RENAMED = {
    "pre_bn": "bn1",
    "bn1_2": "bn2",
    "downsample": "shortcut",
    "final_bn": "bn",
    "fc": "linear",
    "convShortcut": "shortcut",
}
"""Parts of keys in the original studies, and ours; applied only where a key does not fit as it is."""
DEAD = ("sub_block1.",)
"""Prefixes of weights that the original's forward never reads."""


def load_weights(model: nn.Module, path: Path | str) -> None:
    """Copy the weights of a file into a module, in place; nothing in the file is executed.

    Reads safetensors and torch files, whole checkpoints among them, with or without the prefix that data
    parallelism leaves. A model with a normalisation takes the weights of its bare network too.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or keys or shapes do not fit; says which.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    refuse_networks(path)
    try:
        found: Any = (
            load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        )
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as fault:
        reason = (str(fault).splitlines() or [type(fault).__name__])[0]
        raise ValueError(f"{path} cannot be read as weights: {reason}") from fault
    for key in NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} holds no state dict")
    state = {key.removeprefix("module."): value for key, value in found.items()}
    state = {key: value for key, value in state.items() if not key.startswith(DEAD)}
    target = model.state_dict()
    if "network" in dict(model.named_children()) and not any(key.startswith("network.") for key in state):
        state = {f"network.{key}": value for key, value in state.items()}
        state |= {key: value for key, value in target.items() if not key.startswith("network.")}
    state = {key if key in target else _renamed(key): value for key, value in state.items()}
    refuse_misfits(state, target, path)
    model.load_state_dict(state)


NETWORKS = {
    "onnx": "an ONNX network",
    "torch-export": "a program of torch.export",
    "torchscript": "a TorchScript module",
}
"""Files that hold a network with its layers, by the name of the model that reads them."""


def network_in(path: Path) -> str | None:
    """One of ``NETWORKS``; None for weights, or for anything else."""
    if path.suffix.lower() == ".onnx":
        return "onnx"
    names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
    if path.suffix.lower() == ".pt2" or any(name.endswith("archive_format") for name in names):
        return "torch-export"
    return "torchscript" if any(name.endswith("/constants.pkl") for name in names) else None


def refuse_networks(path: Path) -> None:
    """Raises ValueError where a file holds a whole network, not weights; says which."""
    if name := network_in(path):
        raise ValueError(
            f"{path} is {NETWORKS[name]} with layers of its own, not weights: "
            f"{{name: {name}, path: {path}}} is the model of it"
        )


def _renamed(key: str) -> str:
    return ".".join(RENAMED.get(part, part) for part in key.split("."))


def refuse_misfits(state: dict[str, Tensor], target: dict[str, Tensor], path: Path) -> None:
    """Raises ValueError where keys or shapes of a file's state are not those of the model; says which."""
    faults = [f"missing {key}" for key in target if key not in state]
    faults += [f"unexpected {key}" for key in state if key not in target]
    faults += [
        f"{key} is {tuple(state[key].shape)}, the model's {tuple(target[key].shape)}"
        for key in target
        if key in state and state[key].shape != target[key].shape
    ]
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise ValueError(f"{path} does not fit the model: {'; '.join(faults[:8])}{more}")
