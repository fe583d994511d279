"""Weights of the original studies load by key and shape, and what does not fit is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from holdfast.models import build, load_weights

STATES = json.loads((Path(__file__).parents[1] / "reference" / "state_dicts.json").read_text())
CASES = [
    ("nc", "vgg11bn_c10", "vgg11-bn", 10),
    ("nc", "vgg11bn_c100", "vgg11-bn", 100),
    ("nc", "vgg11bn_imagenette", "vgg11-bn", 10),
    ("nc", "preactresnet18_c10", "preact-resnet18", 10),
    ("nc", "preactresnet18_mnist", "preact-resnet18", 10),
    ("nc", "preactresnet18_imagenette", "preact-resnet18", 10),
    ("lolip", "CNN001", "cnn001", 10),
    ("lolip", "CNN002", "cnn002", 10),
    ("lolip", "WRN_40_10", "wrn-40-10", 10),
    ("lolip", "ResNet50", "resnet50", 9),
]
SHAPES = {"CNN001": (1, 28, 28), "CNN002": (1, 28, 28), "WRN_40_10": (3, 32, 32), "ResNet50": (3, 64, 64)}


@pytest.mark.parametrize(("line", "original", "name", "classes"), CASES, ids=[case[1] for case in CASES])
def test_old_checkpoints_load(line: str, original: str, name: str, classes: int, tmp_path: Path) -> None:
    entry: Any = STATES[line][original]
    shape = SHAPES.get(original) or tuple(entry["input_shape"][1:])
    keys = entry if line == "lolip" else entry["state_dict"]
    state = {
        key: torch.tensor(7) if key.endswith("num_batches_tracked") else torch.full(size, float(i % 97))
        for i, (key, size) in enumerate(keys)
    }
    path = tmp_path / "old.pt"
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    model = build(name, input_shape=shape, num_classes=classes)
    load_weights(model, path)
    used = [value for key, value in state.items() if not key.startswith("sub_block1")]
    ours = sorted(round(v.double().mean().item()) for v in model.state_dict().values())
    assert ours == sorted(round(v.double().mean().item()) for v in used)
    if not original.endswith("imagenette"):
        assert torch.equal(next(iter(model.state_dict().values())), used[0])


def test_a_normalised_model_takes_the_weights_of_its_bare_network(tmp_path: Path) -> None:
    bare = build("mlp", input_shape=(1, 4, 4), num_classes=2)
    model = build("mlp", input_shape=(1, 4, 4), num_classes=2, normalize={"mean": [0.5], "std": [0.5]})
    torch.save(bare.state_dict(), tmp_path / "bare.pt")
    load_weights(model, tmp_path / "bare.pt")
    x = torch.rand(3, 1, 4, 4)
    assert torch.equal(model(x), bare((x - 0.5) / 0.5))


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    path = tmp_path / "w.pt"
    torch.save({"0.weight": torch.zeros(3, 4), "1.bias": torch.zeros(3)}, path)
    message = r"missing 0\.bias; unexpected 1\.bias; 0\.weight is \(3, 4\), the model's \(3, 2\)"
    with pytest.raises(ValueError, match=message):
        load_weights(model, path)
    with pytest.raises(FileNotFoundError, match="no file"):
        load_weights(model, tmp_path / "gone.pt")
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_weights(model, path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="no state dict"):
        load_weights(model, path)


def test_nothing_in_a_foreign_file_is_executed(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return Path.touch, (Path(tmp_path / "executed"),)  # type: ignore[return-value]

    torch.save({"0.weight": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_weights(nn.Linear(1, 1), tmp_path / "trap.pt")
    assert not (tmp_path / "executed").exists()
