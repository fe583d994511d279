"""Problems for complete verifiers: the network that was exported, and the property in words."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx.reference
import pytest
import torch
from helpers import images, small_cnn

from holdfast import Threat
from holdfast.certify import export_problems
from holdfast.formats import read_onnx, read_vnnlib


def test_the_files_say_what_the_threat_says(tmp_path: Path) -> None:
    model, (x, y) = small_cnn(), images(3)
    threat = Threat("linf", 0.3)
    path = export_problems(model, x, y, threat, tmp_path / "problems", indices=[4, 7, 9])
    assert path.read_text().splitlines() == [f"model.onnx,{i}.vnnlib,300" for i in (4, 7, 9)]
    network = onnx.reference.ReferenceEvaluator(str(path.parent / "model.onnx"))
    model.eval()
    for row in range(3):
        (logits,) = network.run(None, {"X": x[row : row + 1].numpy()})
        assert np.allclose(logits, model(x[row : row + 1]).detach().numpy(), atol=1e-5)
    text = (path.parent / "7.vnnlib").read_text()
    lower, upper = threat.interval(x[1:2].double())
    for sign, side in ((">=", lower), ("<=", upper)):
        found = re.findall(rf"\(assert \({sign} X_(\d+) (-?[\d.]+)\)\)", text)
        assert [int(i) for i, _ in found] == list(range(64))
        assert torch.allclose(torch.tensor([float(v) for _, v in found]).double(), side.flatten(), atol=1e-12)
    rivals = re.findall(r"\(and \(>= Y_(\d) Y_(\d)\)\)", text)
    assert rivals == [(str(j), str(y[1].item())) for j in range(4) if j != y[1]]
    assert text.count("(") == text.count(")")


def test_our_own_readers_read_what_was_written(tmp_path: Path) -> None:
    model, (x, y), threat = small_cnn().eval(), images(3), Threat("linf", 0.3)
    path = export_problems(model, x, y, threat, tmp_path / "problems", indices=[0, 1, 2])
    network = read_onnx(path.parent / "model.onnx")
    assert torch.allclose(network.module(x), model(x), atol=1e-5)
    for row in range(3):
        (query,) = read_vnnlib(path.parent / f"{row}.vnnlib").queries
        lower, upper = threat.interval(x[row].double())
        assert torch.allclose(query.lower, lower.flatten(), atol=1e-12)
        assert torch.allclose(query.upper, upper.flatten(), atol=1e-12)
        logits = model(x[row : row + 1]).double()[0]
        margins = [float(logits[y[row]] - logits[j]) for j in range(4) if j != y[row]]
        found = [float((matrix @ logits + offsets).max()) for matrix, offsets in query.unsafe]
        assert sorted(found) == pytest.approx(sorted(margins))


def test_only_boxes_can_be_said(tmp_path: Path) -> None:
    x, y = images(2)
    with pytest.raises(ValueError, match="l_inf only, given l2"):
        export_problems(small_cnn(), x, y, Threat("l2", 0.3), tmp_path)
