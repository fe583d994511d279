"""holdfast evaluate of files from elsewhere: an ONNX network as any model; others are answered by what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from holdfast.cli import app
from holdfast.experiments import Run

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


def test_other_networks_are_answered_by_what_they_are(network: Path, tmp_path: Path) -> None:
    def refused(path: Path, words: str, *more: str) -> None:
        result = holdfast("evaluate", path, *ASKED, *more)
        assert result.exit_code == 2
        assert words in result.stderr

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    exported, scripted = tmp_path / "net.pt2", tmp_path / "net.pt"
    torch.export.save(torch.export.export(model, (torch.rand(1, 1, 8, 8),)), exported)
    torch.jit.save(torch.jit.trace(model, torch.rand(1, 1, 8, 8)), scripted)
    for more in ((), ("--architecture", "mlp")):
        refused(exported, "holds a program of torch.export, not weights", *more)
        refused(scripted, "holds a TorchScript module, not weights", *more)
    refused(network, "leave --architecture out", "--architecture", "mlp")
    assert holdfast("evaluate", network).exit_code == 2
    assert "say --data and --threat" in holdfast("evaluate", network).stderr
