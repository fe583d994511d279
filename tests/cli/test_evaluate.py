"""holdfast evaluate of files from elsewhere: networks of ONNX, torch.export and TorchScript as any model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from holdfast.cli import app
from holdfast.experiments import Run
from holdfast.models import load_weights

ASKED = ("--data", "digits", "--threat", "linf:0.05")


def holdfast(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def network(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    path = tmp_path / "net.onnx"
    torch.onnx.export(model, (torch.rand(1, 1, 8, 8),), path, dynamo=True, verbose=False)
    return path


def test_an_onnx_network_is_evaluated_as_any_model(network: Path, tmp_path: Path) -> None:
    asked = [*ASKED, "--attacks", "fgsm", "--methods", "ibp", "evaluation.examples=20", "--runs", tmp_path / "runs"]
    result = holdfast("evaluate", network, *asked)
    assert result.exit_code == 0, result.stderr
    folder = Path(result.stdout.splitlines()[-1])
    found = json.loads((folder / "result.json").read_text())
    (certified,), (attacked,) = found["certified"].values(), found["attacked"].values()
    assert certified <= attacked <= found["standard"]
    assert Run(folder).model()(torch.rand(2, 1, 8, 8)).shape == (2, 10)  # it is built again by its recipe


@pytest.mark.parametrize("kind", ["torch-export", "torchscript"])
def test_networks_that_torch_saved_are_attacked(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval(), torch.rand(1, 1, 8, 8)
    path = tmp_path / ("net.pt2" if kind == "torch-export" else "net.pt")
    if kind == "torch-export":
        torch.export.save(torch.export.export(model, (x,)), path)
    else:
        torch.jit.save(torch.jit.trace(model, x), path)
    asked = [*ASKED, "--attacks", "fgsm", "evaluation.examples=20", "--runs", tmp_path / "runs"]
    result = holdfast("evaluate", path, *asked)
    assert result.exit_code == 0, result.stderr
    folder = Path(result.stdout.splitlines()[-1])
    found = json.loads((folder / "result.json").read_text())
    (attacked,) = found["attacked"].values()
    assert attacked <= found["standard"]
    assert torch.allclose(Run(folder).model()(x), model(x), atol=1e-6)  # it is built again by its recipe


def test_a_network_with_layers_of_its_own_takes_no_architecture(network: Path, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    exported, scripted = tmp_path / "net.pt2", tmp_path / "net.pt"
    torch.export.save(torch.export.export(model, (torch.rand(1, 1, 8, 8),)), exported)
    torch.jit.save(torch.jit.trace(model, torch.rand(1, 1, 8, 8)), scripted)
    for path, kind in ((network, "ONNX"), (exported, "torch.export"), (scripted, "TorchScript")):
        result = holdfast("evaluate", path, *ASKED, "--architecture", "mlp")
        assert result.exit_code == 2
        assert kind in result.stderr
        assert "leave --architecture out" in result.stderr
        result = holdfast("evaluate", path)
        assert result.exit_code == 2
        assert "say --data and --threat" in result.stderr
    with pytest.raises(ValueError, match=r"net\.pt2 is a program of torch\.export.*name: torch-export, path:"):
        load_weights(model, exported)
