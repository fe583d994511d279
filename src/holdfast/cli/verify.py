"""holdfast verify."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.cli.console import answer_for
from holdfast.listeners import Reporter

if TYPE_CHECKING:
    from torch import Tensor

    from holdfast.formats import OnnxNetwork, Property

WORDS = {"proved": "unsat", "refuted": "sat", "undecided": "unknown"}
"""What the verification competition calls them."""


def verify(
    network: Annotated[Path, typer.Argument(help="An ONNX file.")],
    property: Annotated[Path, typer.Argument(help="A property: a .vnnlib or .vnnlib.gz file.")],
    seconds: Annotated[
        float | None, typer.Option(min=0.0, help="After so long the answer is unknown; no limit by default.")
    ] = None,
    witness: Annotated[
        Path | None, typer.Option(help="Where to write the counterexample, if there is one.")
    ] = None,
) -> None:
    """Decide whether a network violates a property: can what the file asserts happen?

    The last line of the output is unsat where no input does it, sat where a counterexample was found, or unknown.
    """
    with answer_for() as progress:
        from holdfast.files import write_text
        from holdfast.formats import read_onnx, read_vnnlib

        if witness is not None and not witness.absolute().parent.is_dir():
            raise FileNotFoundError(f"there is no folder {witness.parent}")
        net, asked = read_onnx(network), read_vnnlib(property)
        if (math.prod(net.input_shape), net.outputs) != (asked.inputs, asked.outputs):
            raise ValueError(
                f"{network} has {math.prod(net.input_shape)} inputs and {net.outputs} outputs, "
                f"{property} speaks of {asked.inputs} and {asked.outputs}"
            )
        word, x = decide(net, asked, seconds, progress)
        if x is not None and witness is not None:
            write_text(witness, in_words(net, x))
        print(word)


def decide(
    network: OnnxNetwork, asked: Property, seconds: float | None, reporter: Reporter
) -> tuple[str, Tensor | None]:
    """``unsat``, ``sat`` with a counterexample (1, ...), or ``unknown``, of all boxes within the time together."""
    from holdfast import certify

    end = math.inf if seconds is None else time.perf_counter() + seconds
    verdicts = set()
    for number, query in enumerate(asked.queries, 1):
        left = end - time.perf_counter()
        found = certify.verify(
            network.module,
            query.lower.view(1, *network.input_shape),
            query.upper.view(1, *network.input_shape),
            [rows for rows, _ in query.unsafe],
            [offsets for _, offsets in query.unsafe],
            seconds=None if seconds is None else max(left, 0.0),
        )
        reporter.stage(
            f"box {number} of {len(asked.queries)}: {found.verdict}, bound {found.bound:.4g}, "
            f"{found.domains} parts, {found.seconds:.1f} s"
        )
        if found.verdict == "refuted":
            return WORDS["refuted"], found.counterexample
        verdicts.add(found.verdict)
    return WORDS["undecided" if "undecided" in verdicts else "proved"], None


def in_words(network: OnnxNetwork, x: Tensor) -> str:
    """A counterexample in the form of the competition: ``((X_0 0.5) ... (Y_0 1.25) ...)``, a pair on each line."""
    import torch

    with torch.no_grad():
        y = network.module(x.float())
    pairs = [f"(X_{i} {value!r})" for i, value in enumerate(x.flatten().tolist())]
    pairs += [f"(Y_{j} {value!r})" for j, value in enumerate(y.flatten().tolist())]
    return "({})\n".format("\n".join(pairs))
