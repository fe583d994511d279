"""The bytes of a run's weights."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers import TINY, linear_model
from safetensors.torch import load_file, save

from holdfast.experiments import Run, resolve
from holdfast.files import write_bytes


def test_the_same_weights_are_the_same_bytes(tmp_path: Path) -> None:
    found = set()
    for _ in range(20):  # safetensors draws an order of its own each time
        Run(tmp_path).write_model(linear_model(10, (1, 8, 8)), (1, 8, 8), 10)
        found.add((tmp_path / "model.safetensors").read_bytes())
    assert len(found) == 1


def test_weights_of_earlier_runs_are_read(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.begin(resolve("digits", TINY).training_recipe(), {}, torch.device("cpu"))
    model = run.experiment.model.build((1, 8, 8), 10)
    run.write_model(model, (1, 8, 8), 10)
    new, state = run.model(), load_file(tmp_path / "model.safetensors")
    write_bytes(
        tmp_path / "model.safetensors", save(state, metadata={"input_shape": "[1, 8, 8]", "num_classes": "10"})
    )
    for name, value in run.model().state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
        assert torch.equal(value, new.state_dict()[name])
