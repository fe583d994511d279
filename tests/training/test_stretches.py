"""What depends on the number of processes that train."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import linear_model, small_cnn
from torch import nn

from holdfast.layers import BatchCentering
from holdfast.objectives import TRADES, CrossEntropy, Objective
from holdfast.training import Training
from holdfast.training.engine import Engine
from holdfast.training.stretches import by_process, stretch


@pytest.mark.parametrize(
    ("model", "objective", "settings", "expected"),
    [
        (linear_model(), CrossEntropy(), {}, []),
        (small_cnn(), CrossEntropy(), {}, ["BatchNorm", "Dropout"]),
        (small_cnn(), TRADES(frozen_statistics=True), {}, ["Dropout"]),
        (nn.Sequential(nn.SyncBatchNorm(3), nn.Dropout(0.0)), CrossEntropy(), {}, []),
        (nn.Sequential(BatchCentering(3)), CrossEntropy(), {}, ["BatchCentering"]),
        (linear_model(), CrossEntropy(), {"augmentations": [{"name": "flip"}]}, ["augmentation"]),
    ],
)
def test_what_each_process_does_for_itself_is_named(
    model: nn.Module, objective: Objective, settings: dict[str, Any], expected: list[str]
) -> None:
    assert by_process(model, objective, Training.model_validate(settings)) == expected


def test_a_stretch_tells_where_it_ran() -> None:
    found = stretch(2, 30, Engine(accelerator="cpu").start(), ["BatchNorm"])
    assert found.pop("device")
    assert found == {
        "stretch": 2,
        "step": 30,
        "processes": 1,
        "accelerator": "cpu",
        "by_process": ["BatchNorm"],
    }
