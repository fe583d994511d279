"""The verification benchmark: resumable, honest about contradictions."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Y_0 = max(X_0, 0) on [−1, 1]: it reaches 0.5, but not 1.5; one published verdict of the two is wrong."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 1)) for name in ("x", "y")]
    nodes = [helper.make_node("Relu", ["x"], ["h"]), helper.make_node("MatMul", ["h", "a"], ["y"])]
    weights = [numpy_helper.from_array(np.ones((1, 1), np.float32), "a")]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], weights)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), tmp_path / "net.onnx"
    )
    rows = ["network,property,limit_s,verdict,solved_by_seconds"]
    for name, least, published in (("half", 0.5, "unsat"), ("more", 1.5, "unsat")):
        names = "(declare-const X_0 Real)(declare-const Y_0 Real)"
        (tmp_path / f"{name}.vnnlib").write_text(
            f"{names}(assert (>= X_0 -1))(assert (<= X_0 1))(assert (>= Y_0 {least}))"
        )
        rows.append(f"net.onnx,{name}.vnnlib,60,{published},somebody:1.5")
    (tmp_path / "instances.csv").write_text("\n".join(rows))
    return tmp_path


def test_it_goes_on_where_it_stopped_and_names_what_contradicts(
    verification: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, decide = [], verification.decide

    def counted(*arguments: Any) -> Any:
        asked.append(arguments)
        return decide(*arguments)

    monkeypatch.setattr(verification, "decide", counted)
    out = folder / "found.jsonl"
    command = [str(folder), "--seconds", "20", "--out", str(out)]
    assert verification.main([*command, "--limit", "1"]) == 1
    first = json.loads(out.read_text())
    assert (first["verdict"], first["published"], len(asked)) == ("sat", "unsat", 1)
    out.write_text(out.read_text() + '{"network": "net.onnx", "prop')  # as a power cut leaves it
    assert verification.main(command) == 1
    assert len(asked) == 2
    printed = capsys.readouterr().out
    assert "| net | half | unsat | **sat** |" in printed
    assert "| net | more | unsat | unsat |" in printed
    assert "| net | 1 of 2 | 0 | 1 |" in printed
    assert "somebody:1.5" in printed
    verification.main(command)
    verification.main([*command[:1], "--seconds", "30", "--out", str(out), "--only", "more"])
    assert len(asked) == 3  # another limit is another question
