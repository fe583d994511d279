"""Stretches of a training, from a start or a resumption to the next: where each ran, and what that changes."""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from holdfast.layers import BatchCentering
from holdfast.objectives import Objective
from holdfast.training.engine import RunningEngine
from holdfast.training.plan import Training


def stretch(number: int, step: int, engine: RunningEngine, divided: list[str]) -> dict[str, Any]:
    """The line of a stretch in the history.

    Args:
        number: from 1 on.
        step: batches trained on before it.
        divided: see ``by_process``.
    """
    place = {"processes": engine.processes, "accelerator": engine.device.type, "device": device_name(engine.device)}
    return {"stretch": number, "step": step, **place, "by_process": divided}


def by_process(model: nn.Module, objective: Objective, training: Training) -> list[str]:
    """What every process of a training does for its own share of a batch, so that the numbers depend on how many
    there are; all else is the same but for rounding."""
    frozen = getattr(getattr(objective, "objective", objective), "frozen_statistics", False)
    modules = list(model.modules())
    normalises = [isinstance(one, _BatchNorm) and not isinstance(one, nn.SyncBatchNorm) for one in modules]
    found = {
        "BatchNorm": any(normalises) and not frozen,
        "BatchCentering": any(isinstance(one, BatchCentering) for one in modules) and not frozen,
        "Dropout": any(isinstance(one, _DropoutNd) and one.p > 0 for one in modules),
        "augmentation": bool(training.augmentations),
    }
    return [name for name, divided in found.items() if divided]


def device_name(device: torch.device) -> str:
    """What a device is called, such as ``NVIDIA H100``."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return name or platform.machine()
