"""holdfast verify: the word on the last line, the witness, and what bad files are answered with."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner, Result

from holdfast import certify
from holdfast.cli import app


def holdfast(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """Y = (max(X_0, 0) - max(X_1, 0), X_0 + X_1), at a batch of one."""
    nodes = [helper.make_node("Relu", ["x"], ["h"]), helper.make_node("MatMul", ["h", "a"], ["p"])]
    nodes += [helper.make_node("MatMul", ["x", "b"], ["q"]), helper.make_node("Add", ["p", "q"], ["y"])]
    matrices = {"a": [[1, 0], [-1, 0]], "b": [[0, 1], [0, 1]]}
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 2))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 2))],
        [numpy_helper.from_array(np.array(rows, np.float32), name) for name, rows in matrices.items()],
    )
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def asked(folder: Path, unsafe: str, box: str = "(assert (>= X_0 0)) (assert (<= X_0 1))") -> Path:
    path = folder / "question.vnnlib"
    names = "".join(f"(declare-const {name} Real)" for name in ("X_0", "X_1", "Y_0", "Y_1"))
    path.write_text(f"{names}\n(assert (>= X_1 -1)) (assert (<= X_1 1)) {box}\n(assert {unsafe})\n")
    return path


@pytest.fixture
def corners(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """In the place of branch and bound what its words say, tried on corners; the calls that were made."""
    calls: list[dict[str, Any]] = []

    def verify(
        model: Any, lower: Any, upper: Any, rows: Any, offsets: Any, *, seconds: float | None
    ) -> SimpleNamespace:
        calls.append({"rows": rows, "offsets": offsets, "seconds": seconds})
        sides = torch.cartesian_prod(*torch.stack([lower[0], upper[0]], 1))
        values = model(sides.float()).double()
        clauses = [values @ row.T + offset for row, offset in zip(rows, offsets, strict=True)]
        holds = torch.stack([(clause > 0).any(1) for clause in clauses], 1).all(1)
        wrong = sides[~holds][:1]
        verdict = "undecided" if seconds == 0 else "refuted" if len(wrong) else "proved"
        return SimpleNamespace(
            verdict=verdict, counterexample=wrong if len(wrong) else None, bound=0.0, domains=0, seconds=0.0
        )

    monkeypatch.setattr(certify, "verify", verify, raising=False)
    return calls


def test_unsat_where_no_input_does_it(network: Path, tmp_path: Path, corners: list[dict[str, Any]]) -> None:
    witness = tmp_path / "witness.txt"
    result = holdfast("verify", network, asked(tmp_path, "(>= Y_1 2.5)"), "--witness", witness)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "unsat"
    assert not witness.exists()
    assert corners[0]["rows"][0].tolist() == [[0, -1]]
    assert corners[0]["offsets"][0].tolist() == [2.5]


def test_sat_with_a_witness(network: Path, tmp_path: Path, corners: list[dict[str, Any]]) -> None:
    witness = tmp_path / "witness.txt"
    result = holdfast("verify", network, asked(tmp_path, "(and (>= Y_1 1.5) (<= Y_0 0))"), "--witness", witness)
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "sat")
    text = witness.read_text()
    assert text.startswith("((X_0 1.0)\n(X_1 1.0)\n(Y_0 ")
    assert dict(re.findall(r"\((\w+) ([-\d.e]+)\)", text)) == {
        "X_0": "1.0",
        "X_1": "1.0",
        "Y_0": "0.0",
        "Y_1": "2.0",
    }
    assert text.count("(") == text.count(")")


def test_boxes_share_the_time_and_one_that_is_sat_decides(
    network: Path, tmp_path: Path, corners: list[dict[str, Any]]
) -> None:
    boxes = "(or (and (<= X_0 0.25) (>= Y_1 3)) (and (>= X_0 0.5) (<= Y_1 -0.25)))"
    result = holdfast("verify", network, asked(tmp_path, boxes), "--seconds", "60")
    assert result.stdout.splitlines()[-1] == "sat"
    assert 0 < corners[1]["seconds"] <= corners[0]["seconds"] <= 60
    result = holdfast("verify", network, asked(tmp_path, boxes), "--seconds", "0")
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "unknown")


def test_an_empty_box_is_unsat(network: Path, tmp_path: Path) -> None:
    question = asked(tmp_path, "(>= Y_1 0)", "(assert (>= X_0 1)) (assert (<= X_0 0))")
    assert holdfast("verify", network, question).stdout.splitlines()[-1] == "unsat"


def test_bad_files_are_one_sentence(network: Path, tmp_path: Path) -> None:
    def refused(words: str, *arguments: str | Path) -> None:
        result = holdfast("verify", *arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert re.fullmatch(f"holdfast: .*{words}.*", result.stderr.strip())

    question, bad = asked(tmp_path, "(>= Y_1 0)"), tmp_path / "bad.vnnlib"
    bad.write_text("(x)")
    refused("there is no file other.onnx", "other.onnx", question)
    refused("cannot be read as ONNX", question, question)
    refused("is no declaration", network, bad)
    refused("there is no folder nowhere", network, question, "--witness", "nowhere/w.txt")
    question.write_text(question.read_text().replace("(declare-const Y_1 Real)", "").replace("Y_1", "Y_0"))
    refused("has 2 inputs and 2 outputs, .* speaks of 2 and 1", network, question)


def test_branch_and_bound_finds_both_answers(network: Path, tmp_path: Path) -> None:
    unsat = holdfast("verify", network, asked(tmp_path, "(>= Y_1 2.5)"))
    assert (unsat.exit_code, unsat.stdout.splitlines()[-1]) == (0, "unsat"), unsat.stderr
    sat = holdfast("verify", network, asked(tmp_path, "(and (>= Y_1 1.5) (<= Y_0 0.25))"))
    assert (sat.exit_code, sat.stdout.splitlines()[-1]) == (0, "sat"), sat.stderr
