"""VNN-LIB properties: a box of inputs, and the outputs that no input in it may have."""

from __future__ import annotations

import gzip
import itertools
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MANY = 100_000
"""Alternatives in a property, at most: disjunctions that multiply are refused, not waited for."""

_PIECE = re.compile(r"[()]|[^\s()\[\]]+(?:\s*\[[^\]]*\])?|\S")
_COMPARISONS = ("<=", ">=", "=", "==")


@dataclass(frozen=True)
class Query:
    """A box, and the unsafe outputs: the property is violated where an input in it has one of them.

    ``unsafe`` is a disjunction of conjunctions: outputs y are unsafe where for one (rows, offsets) of it all
    entries of rows · y + offsets are ≤ 0.
    """

    lower: Tensor
    """(n,) float64, the network's inputs in the order of its flattened input."""
    upper: Tensor
    """(n,) float64."""
    unsafe: tuple[tuple[Tensor, Tensor], ...]
    """Each (R, K) and (R,), float64."""


@dataclass(frozen=True)
class Property:
    """What a file asks: is any query violated?"""

    queries: tuple[Query, ...]
    """One for each box; none where no input satisfies what is asked of the inputs."""
    inputs: int
    outputs: int


class _Word(str):
    """A word or number with its line."""

    line: int


_Form = dict[tuple[str, int], Fraction]
"""A linear function: coefficients by ("X", i) or ("Y", j), the constant under ("", 0)."""


@dataclass(frozen=True)
class _Atom:
    """form ≤ 0, and the line where it stands."""

    form: _Form
    line: int


_Case = list[_Atom]
"""A conjunction; a list of them is the disjunction."""


def read_vnnlib(path: Path | str) -> Property:
    """The property of a ``.vnnlib`` or ``.vnnlib.gz`` file, of version 1, or 2 with one network and one tensor on
    either side.

    Bounds of the box are rounded outward and offsets of the unsafe set down where a decimal is no float64, so that
    a property that is proved holds as it is written; coefficients of outputs are the nearest float64.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such property; one sentence with the line and the word.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8")
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as fault:
        raise ValueError(f"{path} cannot be read as VNN-LIB: {fault}") from fault
    try:
        return _Reader(_trees(text)).property()
    except ValueError as fault:
        raise ValueError(f"{path}, {fault}") from None


def _trees(text: str) -> list[Any]:
    """The nested lists of a text in S-expressions."""
    stack: list[list[Any]] = [[]]
    opened: list[int] = []
    for number, line in enumerate(text.splitlines(), 1):
        for found in _PIECE.findall(line.partition(";")[0]):
            if found == "(":
                opened.append(number)
                stack.append([])
            elif found == ")":
                if not opened:
                    raise ValueError(f"line {number}: ')' closes nothing")
                opened.pop()
                inner = stack.pop()
                stack[-1].append(inner)
            else:
                word = _Word("".join(found.split()))
                word.line = number
                stack[-1].append(word)
    if opened:
        raise ValueError(f"line {opened[-1]}: '(' is never closed")
    return stack[0]


def _line(tree: Any) -> int:
    while isinstance(tree, list):
        if not tree:
            return 0
        tree = tree[0]
    return int(tree.line)


def _text(tree: Any) -> str:
    whole = str(tree) if isinstance(tree, str) else f"({' '.join(map(_text, tree))})"
    return whole if len(whole) <= 60 else f"{whole[:57]}..."


def _fault(tree: Any, reason: str) -> ValueError:
    return ValueError(f"line {_line(tree)}: {_text(tree)!r} {reason}")


class _Reader:
    def __init__(self, trees: list[Any]) -> None:
        self.trees = trees
        self.tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        """Of version 2: side and shape by name."""
        self.sizes = {"X": 0, "Y": 0}

    def property(self) -> Property:
        asserted: list[list[_Case]] = []
        for tree in self.trees:
            match tree:
                case ["declare-const" | "declare-fun", name, *_]:
                    self._declare(name)
                case ["declare-network", _, *parts]:
                    for part in parts:
                        self._declare_tensor(part)
                case ["vnnlib-version" | "set-logic", *_] | ["check-sat"]:
                    pass
                case ["assert", statement]:
                    asserted.append(self._cases(statement))
                case _:
                    raise _fault(tree, "is no declaration or assertion of VNN-LIB")
        if not all(self.sizes.values()):
            raise ValueError("line 1: no inputs X or no outputs Y are declared")
        return Property(tuple(self._queries(asserted)), self.sizes["X"], self.sizes["Y"])

    def _declare(self, name: Any) -> None:
        found = re.fullmatch(r"([XY])_(\d+)", name) if isinstance(name, str) else None
        if not found:
            raise _fault(name, "is declared, expected X_0, X_1, … and Y_0, Y_1, …")
        side = found[1]
        if int(found[2]) != self.sizes[side]:
            raise _fault(name, f"is declared, expected {side}_{self.sizes[side]} next")
        self.sizes[side] += 1

    def _declare_tensor(self, tree: Any) -> None:
        match tree:
            case ["declare-input" | "declare-output" as kind, name, element]:
                side = "X" if kind == "declare-input" else "Y"
                shape = _indices(element)
                if shape is None or self.sizes[side]:
                    raise _fault(tree, "is not read: one tensor with its shape on either side of one network")
                self.tensors[str(name)], self.sizes[side] = (side, shape), math.prod(shape)
            case _:
                raise _fault(tree, "is not read in a network, only declare-input and declare-output")

    def _cases(self, tree: Any) -> list[_Case]:
        """A statement as a disjunction of conjunctions."""
        match tree:
            case ["and", *parts] if parts:
                return _product([self._cases(part) for part in parts], tree)
            case ["or", *parts] if parts:
                return [case for part in parts for case in self._cases(part)]
            case [word, left, right] if word in _COMPARISONS:
                pair = self._form(left), self._form(right)
                ways = {"<=": (pair,), ">=": (pair[::-1],)}.get(word, (pair, pair[::-1]))
                return [[_Atom(_plus(less, more, -1), _line(tree)) for less, more in ways]]
            case ["<" | ">" | "!=", *_]:
                raise _fault(tree, "leaves the border out; only sets with their border are read: <= and >=")
        raise _fault(tree, "is no statement, expected (<= a b), (>= a b), (and ...) or (or ...)")

    def _form(self, tree: Any) -> _Form:
        match tree:
            case str():
                return self._leaf(tree)
            case ["+", *terms] if terms:
                return _sum([self._form(term) for term in terms])
            case ["-", term]:
                return _plus({}, self._form(term), -1)
            case ["-", first, *terms]:
                return _plus(self._form(first), _sum([self._form(term) for term in terms]), -1)
            case ["*", *factors] if factors:
                result: _Form = {("", 0): Fraction(1)}
                for factor in map(self._form, factors):
                    if factor.keys() - {("", 0)} and result.keys() - {("", 0)}:
                        raise _fault(tree, "multiplies variables; only linear functions are read")
                    number, form = (result, factor) if not result.keys() - {("", 0)} else (factor, result)
                    result = _plus({}, form, number.get(("", 0), Fraction(0)))
                return result
        raise _fault(tree, "is no linear function of inputs or outputs")

    def _leaf(self, word: Any) -> _Form:
        try:
            return {("", 0): Fraction(word)}
        except (ValueError, ZeroDivisionError):
            pass
        found = re.fullmatch(r"([XY])_(\d+)", word)
        if found and not self.tensors and int(found[2]) < self.sizes[found[1]]:
            return {(found[1], int(found[2])): Fraction(1)}
        side, shape = self.tensors.get(word.partition("[")[0], ("", ()))
        indices = _indices(word) if "[" in word else ()
        if not side or indices is None:
            raise _fault(word, "is neither a number nor a declared variable")
        indices = () if indices == (0,) and not shape else indices
        if len(indices) != len(shape) or any(i >= n for i, n in zip(indices, shape, strict=True)):
            raise _fault(word, f"is outside of the shape {list(shape)}")
        return {(side, int(np.ravel_multi_index(indices, shape)) if shape else 0): Fraction(1)}

    def _queries(self, asserted: Sequence[list[_Case]]) -> Iterator[Query]:
        fixed = [atom for cases in asserted if len(cases) == 1 for atom in cases[0]]
        box = [np.full(self.sizes["X"], side) for side in (-np.inf, np.inf)]
        rows = self._narrow(box, fixed)
        if rows is None:
            return
        found: dict[tuple[bytes, ...], tuple[list[Any], list[Any]]] = {}
        for case in _product([cases for cases in asserted if len(cases) > 1], self.trees):
            own = [side.copy() for side in box]
            more = self._narrow(own, case)
            if more is None or (own[0] > own[1]).any():
                continue
            for side, word in zip(own, ("lower", "upper"), strict=True):
                if not np.isfinite(side).all():
                    name = f"X_{int(np.argmin(np.isfinite(side)))}"
                    raise ValueError(f"line {_line(self.trees)}: {name} has no {word} bound; only boxes are read")
            if not rows + more:
                raise ValueError(f"line {_line(self.trees)}: nothing is asked of the outputs Y")
            _, unsafe = found.setdefault(tuple(side.tobytes() for side in own), (own, []))
            unsafe.append(self._matrix(rows + more))
        for (lower, upper), unsafe in found.values():
            yield Query(torch.from_numpy(lower), torch.from_numpy(upper), tuple(unsafe))

    def _narrow(self, box: Sequence[Any], case: _Case) -> list[_Form] | None:
        """Cut the box by what a conjunction says of single inputs; what it says of outputs, or None where a part of
        it is false."""
        rows = []
        for atom in case:
            inputs = [i for side, i in atom.form if side == "X"]
            outputs = [j for side, j in atom.form if side == "Y"]
            constant = atom.form.get(("", 0), Fraction(0))
            if outputs and inputs:
                raise ValueError(f"line {atom.line}: inputs and outputs in one inequality; only boxes are read")
            if len(inputs) > 1:
                raise ValueError(f"line {atom.line}: several inputs in one inequality; only boxes are read")
            if outputs:
                rows.append(atom.form)
            elif inputs:
                factor = atom.form["X", inputs[0]]
                limit, (lower, upper) = -constant / factor, box
                if factor > 0:
                    upper[inputs[0]] = min(upper[inputs[0]], _above(limit))
                else:
                    lower[inputs[0]] = max(lower[inputs[0]], _below(limit))
            elif constant > 0:
                return None
        return rows

    def _matrix(self, forms: Sequence[_Form]) -> tuple[Tensor, Tensor]:
        matrix = torch.zeros(len(forms), self.sizes["Y"], dtype=torch.float64)
        for row, form in zip(matrix, forms, strict=True):
            for (side, j), factor in form.items():
                if side:
                    row[j] = float(factor)
        offsets = [_below(form.get(("", 0), Fraction(0))) for form in forms]
        return matrix, torch.tensor(offsets, dtype=torch.float64)


def _product(parts: Sequence[list[_Case]], tree: Any) -> list[_Case]:
    """A conjunction of disjunctions as one disjunction."""
    if math.prod(map(len, parts)) > MANY:
        raise ValueError(f"line {_line(tree)}: the disjunctions make more than {MANY} alternatives together")
    return [list(itertools.chain.from_iterable(choice)) for choice in itertools.product(*parts)]


def _plus(first: Mapping[Any, Fraction], second: Mapping[Any, Fraction], factor: int | Fraction) -> _Form:
    result = dict(first)
    for key, value in second.items():
        result[key] = result.get(key, Fraction(0)) + factor * value
    return {key: value for key, value in result.items() if value}


def _sum(forms: Sequence[_Form]) -> _Form:
    result: _Form = {}
    for form in forms:
        result = _plus(result, form, 1)
    return result


def _indices(word: str) -> tuple[int, ...] | None:
    """(0, 3) of ``X[0,3]``; None where it is no such thing."""
    found = re.fullmatch(r"[^\[]+\[(\d+(?:,\d+)*|)\]", word) if isinstance(word, str) else None
    return tuple(map(int, filter(None, found[1].split(",")))) if found else None


def _below(number: Fraction) -> float:
    """The largest float64 that is not above."""
    nearest = float(number)
    return nearest if Fraction(nearest) <= number else math.nextafter(nearest, -math.inf)


def _above(number: Fraction) -> float:
    return -_below(-number)
