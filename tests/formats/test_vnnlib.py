"""VNN-LIB properties: what is written is what is read, and what is not read is named with its line."""

from __future__ import annotations

import gzip
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from helpers import images, small_cnn

from holdfast import Threat
from holdfast.certify import export_problems
from holdfast.formats import Property, read_onnx, read_vnnlib

DECLARED = """
(declare-const X_0 Real) (declare-const X_1 Real)  ; the inputs
(declare-const Y_0 Real)
(declare-const Y_1 Real)
"""
BOX = "(assert (>= X_0 -1)) (assert (<= X_0 1e-1)) (assert (and (<= 0.25 X_1) (<= X_1 0.5)))\n"


def read(folder: Path, text: str) -> Property:
    path = folder / "one.vnnlib"
    path.write_text(text)
    return read_vnnlib(path)


def test_a_box_and_a_disjunction_of_conjunctions(tmp_path: Path) -> None:
    found = read(
        tmp_path, DECLARED + BOX + "(assert (or (and (>= Y_0 Y_1) (<= Y_0 3)) (<= (+ (* 2 Y_1) (- Y_0) 1) 0)))"
    )
    assert (found.inputs, found.outputs) == (2, 2)
    (query,) = found.queries
    assert query.lower.tolist() == [-1, 0.25]
    assert query.upper.tolist()[1] == 0.5
    (rows, offsets), (other, offset) = query.unsafe
    assert rows.tolist() == [[-1, 1], [1, 0]]
    assert offsets.tolist() == [0, -3]
    assert (other.tolist(), offset.tolist()) == ([[-1, 2]], [1])


def test_alternatives_with_boxes_of_their_own(tmp_path: Path) -> None:
    text = "(assert (or (and (<= X_0 -0.5) (>= Y_0 1)) (and (>= X_0 0) (<= Y_1 2)) (and (>= X_0 2) (<= Y_1 2))))"
    left, right = read(tmp_path, DECLARED + BOX + text).queries  # the third is empty
    assert (left.lower[0], left.upper[0], right.lower[0]) == (-1, -0.5, 0)
    assert left.unsafe[0][0].tolist() == [[-1, 0]]
    assert right.unsafe[0][0].tolist() == [[0, 1]]


def test_several_disjunctions_multiply(tmp_path: Path) -> None:
    text = "(assert (or (<= Y_0 1) (>= Y_0 2)))(assert (or (<= Y_1 1) (>= Y_1 2)))(assert (= Y_0 Y_1))"
    (query,) = read(tmp_path, DECLARED + BOX + text).queries
    assert [len(rows) for rows, _ in query.unsafe] == [4, 4, 4, 4]


def test_decimals_are_rounded_away_from_what_is_claimed(tmp_path: Path) -> None:
    bounds = "(assert (>= X_0 0.1)) (assert (<= X_0 0.7)) (assert (>= X_1 0.3)) (assert (<= X_1 0.6))"
    (query,) = read(tmp_path, DECLARED + bounds + "(assert (<= (+ Y_0 0.1) 0))").queries
    for side, decimals, sign in ((query.lower, ("0.1", "0.3"), 1), (query.upper, ("0.7", "0.6"), -1)):
        for number, decimal in zip(side.tolist(), decimals, strict=True):
            assert sign * Fraction(number) <= sign * Fraction(decimal)
            assert abs(number - float(decimal)) < 1e-15
    assert Fraction(query.unsafe[0][1].item()) <= Fraction("0.1")


def test_the_second_version(tmp_path: Path) -> None:
    text = """(vnnlib-version <2.0>)
    (declare-network net (declare-input X real [1, 2]) (declare-output Out float32 [1,2]))
    (assert (and (>= X[0,0] -1) (<= X [0,0] 1) (>= X[0, 1] 0) (<= X[0,1] 1)))
    (assert (or (<= Out[0,0] Out[0,1]) (== Out[0,1] 2.0)))"""
    found = read(tmp_path, text)
    assert (found.inputs, found.outputs) == (2, 2)
    (query,) = found.queries
    assert query.lower.tolist() == [-1, 0]
    assert [rows.tolist() for rows, _ in query.unsafe] == [[[1, -1]], [[0, 1], [0, -1]]]


def test_a_contradiction_asks_nothing(tmp_path: Path) -> None:
    assert read(tmp_path, DECLARED + BOX + "(assert (>= X_0 2)) (assert (<= Y_0 0))").queries == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("(assert (<= Y_0 0))", "X_0 has no lower bound"),
        (f"{BOX}(assert (<= Y_0 0)", r"line 6: '\(' is never closed"),
        (f"{BOX})", r"line 6: '\)' closes nothing"),
        (f"{BOX}(assert (<= Y_2 0))", "line 6: 'Y_2' is neither a number nor a declared variable"),
        (f"{BOX}(assert (< Y_0 0))", r"line 6: '\(< Y_0 0\)' leaves the border out"),
        (f"{BOX}(assert (<= (* Y_0 Y_1) 0))", r"line 6: '\(\* Y_0 Y_1\)' multiplies variables"),
        (f"{BOX}(assert (<= Y_0 X_0))", "line 6: inputs and outputs in one inequality"),
        (f"{BOX}(assert (<= X_1 X_0))", "line 6: several inputs in one inequality"),
        (f"{BOX}(assert (=> (<= Y_0 0) (<= Y_1 0)))", "line 6: .* is no statement"),
        (f"{BOX}(prove Y_0)", r"line 6: '\(prove Y_0\)' is no declaration or assertion"),
        (BOX, "nothing is asked of the outputs"),
        ("(declare-const Z_0 Real)", "line 5: 'Z_0' is declared, expected X_0"),
        ("(declare-const Y_3 Real)", "line 5: 'Y_3' is declared, expected Y_2 next"),
    ],
)
def test_what_is_not_read_is_named_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read(tmp_path, f"{DECLARED}{text}")
    assert "one.vnnlib, line" in str(caught.value)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "two.vnnlib.gz"
    path.write_bytes(gzip.compress(f"{DECLARED}{BOX}(assert (<= Y_0 0))".encode()))
    assert len(read_vnnlib(path).queries) == 1
    path.write_bytes(b"no gzip at all")
    with pytest.raises(ValueError, match="cannot be read as VNN-LIB"):
        read_vnnlib(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_vnnlib(tmp_path / "three.vnnlib")


def test_what_is_exported_is_read_back(tmp_path: Path) -> None:
    model, (x, y), threat = small_cnn().eval(), images(2), Threat("linf", 0.3)
    folder = export_problems(model, x, y, threat, tmp_path / "problems").parent
    network = read_onnx(folder / "model.onnx")
    assert torch.allclose(network.module(x), model(x), atol=1e-5)
    assert network.input_shape == tuple(x.shape[1:])
    lower, upper = threat.interval(x[1:].double())
    found = read_vnnlib(folder / "1.vnnlib")
    (query,) = found.queries
    assert torch.equal(query.lower, lower.flatten())
    assert torch.equal(query.upper, upper.flatten())
    logits = torch.randn(50, found.outputs, dtype=torch.float64)
    wrong = (logits.argmax(1) != y[1]).tolist()
    assert wrong == [any((rows @ z + offsets <= 0).all() for rows, offsets in query.unsafe) for z in logits]
