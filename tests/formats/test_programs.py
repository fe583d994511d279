"""Networks in files of torch: answers and bounds of what was saved, any batch, and nothing run or unpickled."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import images
from torch import Tensor, nn

from holdfast import Threat
from holdfast.attacks import PGD
from holdfast.bounds import UnsupportedOperator, bound_margins
from holdfast.formats import read_exported, read_torchscript
from holdfast.inference import fingerprint
from holdfast.models import Model

SHAPE = (1, 8, 8)


class Net(nn.Module):
    """Reshapes with sizes that an export of one batch size writes down."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head, self.scale = nn.Conv2d(1, 2, 3), nn.Linear(72, 10), torch.tensor([2.0, 0.5])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)) * self.scale.view(1, 2, 1, 1)
        return self.head(x.view(x.shape[0], 72))


def exported(path: Path, batch: int | None) -> tuple[nn.Module, Path]:
    model = Net().eval()
    shapes = ({0: torch.export.Dim.DYNAMIC},) if batch is None else None
    program = torch.export.export(model, (torch.rand(batch or 4, *SHAPE),), dynamic_shapes=shapes)
    torch.export.save(program, path)
    return model, path


@pytest.mark.parametrize("batch", [None, 1, 2, 3])
def test_an_exported_program_answers_and_is_bounded_as_what_was_exported(tmp_path: Path, batch: int | None) -> None:
    model, path = exported(tmp_path / "net.pt2", batch)
    network, (x, y), threat = read_exported(path), images(5, classes=10), Threat("linf", 0.02)
    assert torch.allclose(network(x), model(x), atol=1e-6)
    for method in ("ibp", "crown"):
        found, wanted = (bound_margins(each, x, y, threat, method) for each in (network, model))
        assert torch.allclose(found, wanted, atol=1e-5)
    assert PGD(steps=3)(network, x, y, threat, seed=0).x_adv.shape == x.shape


@pytest.mark.parametrize("fixed", [False, True])
def test_torchscript_answers_and_is_attacked_and_refused_by_bounds(tmp_path: Path, fixed: bool) -> None:
    model, path, (x, y) = Net().eval(), tmp_path / "net.pt", images(5, classes=10)
    script = torch.jit.trace(model, torch.rand(1, *SHAPE), check_trace=False) if fixed else torch.jit.script(model)
    torch.jit.save(script, path)
    network = Model.parse({"name": "torchscript", "path": str(path)}).build(SHAPE, 10)
    assert torch.allclose(network(x), model(x), atol=1e-6)
    assert PGD(steps=3)(network, x, y, Threat("linf", 0.1), seed=0).x_adv.shape == x.shape
    with pytest.raises(UnsupportedOperator, match=r"TorchScript hides .* ONNX or torch\.export"):
        bound_margins(network, x, y, Threat("linf", 0.1))


def test_the_models_of_a_recipe_say_what_does_not_fit(tmp_path: Path) -> None:
    _, path = exported(tmp_path / "net.pt2", 1)
    model = Model.parse({"name": "torch-export", "path": str(path)})
    assert model.build(SHAPE, 10)(torch.rand(3, *SHAPE)).shape == (3, 10)
    with pytest.raises(ValueError, match=r"net\.pt2 gives answers of shape \(2, 10\).*have 4 classes"):
        model.build(SHAPE, 4)
    with pytest.raises(ValueError, match=r"net\.pt2 does not take images of \(3, 5, 5\)"):
        model.build((3, 5, 5), 10)


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, (str(Bomb.folder),)

    folder: Path


def test_nothing_in_a_file_is_run_or_unpickled(tmp_path: Path) -> None:
    _, path = exported(tmp_path / "net.pt2", None)
    Bomb.folder = tmp_path / "exploded"

    def changed(replaced: dict[str, bytes]) -> Path:
        target = tmp_path / "changed.pt2"
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
            names = old.namelist()
            folder = names[0].partition("/")[0]
            for name in [*names, *(f"{folder}/{extra}" for extra in replaced if f"{folder}/{extra}" not in names)]:
                new.writestr(name, replaced.get(name.partition("/")[2], old.read(name) if name in names else b""))
        return target

    for name in ("data/constants/opaque_obj_0", "data/constants/custom_obj_0", "data/aotinductor/model/net.so"):
        with pytest.raises(ValueError, match=f"holds {name}, which would be run or unpickled"):
            read_exported(changed({name: pickle.dumps(Bomb())}))
    sample = "data/sample_inputs/model.pt"
    assert any(name.endswith(sample) for name in zipfile.ZipFile(path).namelist())
    bomb = tmp_path / "bomb.pt"
    torch.save(Bomb(), bomb)
    before = dict(os.environ)
    with pytest.raises(ValueError, match=r"changed\.pt2 cannot be read by torch"):
        read_exported(changed({sample: bomb.read_bytes()}))
    assert dict(os.environ) == before
    assert not Bomb.folder.exists()


def test_a_frozen_module_is_known_by_its_file(tmp_path: Path) -> None:
    networks = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        path = tmp_path / f"{seed}.pt"
        torch.jit.save(torch.jit.freeze(torch.jit.script(Net().eval())), path)
        networks += [read_torchscript(path), read_torchscript(path)]
        assert not networks[-1].train().training
    first, again, other, _ = map(fingerprint, networks)
    assert first == again
    assert first != other


def test_files_of_another_kind(tmp_path: Path) -> None:
    for read in (read_exported, read_torchscript):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            read(tmp_path / "none.pt2")
        path = tmp_path / "text.pt2"
        path.write_text("hello, world")
        with pytest.raises(ValueError, match=r"text\.pt2 is no "):
            read(path)
