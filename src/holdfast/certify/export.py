"""Verification problems as files for complete verifiers: ONNX networks and VNN-LIB properties."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

import torch
from torch import Tensor, nn

from holdfast.files import whole_file, write_text
from holdfast.inference import check_inputs, frozen_eval
from holdfast.threat import Threat


def export_problems(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    folder: Path,
    *,
    indices: Sequence[int] | None = None,
    timeout: int = 300,
) -> Path:
    """Write ``model.onnx``, a property ``INDEX.vnnlib`` for each example, and ``instances.csv`` that lists them.

    A property holds where some x' in the box and some j ≠ y have z_j ≥ z_y: a verifier that answers *unsat* has
    certified the example, and what it answers with *sat* is an adversarial example.

    Args:
        x, y: (N, ...), (N,).
        threat: in l_inf, cut with its box.
        indices: the examples' numbers, for the names of the files.
        timeout: seconds, for the list.

    Returns:
        ``folder / "instances.csv"``.

    Raises:
        ValueError: a threat set that is no box, which VNN-LIB cannot say; inputs that make no sense; onnx and
            onnxscript are not installed (``pip install holdfast[verify]``).
    """
    y = check_inputs(x, y, threat)
    if not threat.is_box:
        raise ValueError(f"VNN-LIB properties are boxes: l_inf only, given {threat}")
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as fault:
        raise ValueError("exporting needs onnx and onnxscript: pip install holdfast[verify]") from fault
    folder.mkdir(parents=True, exist_ok=True)
    with frozen_eval(model), whole_file(folder / "model.onnx") as temporary:
        program = torch.onnx.export(
            model, (x[:1],), input_names=["X"], output_names=["Y"], dynamo=True, verbose=False, optimize=True
        )
        assert program is not None
        program.save(temporary, external_data=False)
        classes = model(x[:1]).shape[1]
    lower, upper = (side.flatten(1).tolist() for side in threat.interval(x.double()))
    lines = []
    numbers = list(range(len(x))) if indices is None else list(indices)
    for number, low, high, label in zip(numbers, lower, upper, y.tolist(), strict=True):
        write_text(folder / f"{number}.vnnlib", vnnlib(low, high, label, classes, f"example {number}, {threat}"))
        lines.append(f"model.onnx,{number}.vnnlib,{timeout}\n")
    write_text(folder / "instances.csv", "".join(lines))
    return folder / "instances.csv"


def vnnlib(lower: Sequence[float], upper: Sequence[float], label: int, classes: int, note: str) -> str:
    """The property that some class reaches the label's logit somewhere in a box."""
    declared = [f"(declare-const X_{i} Real)" for i in range(len(lower))]
    declared += [f"(declare-const Y_{j} Real)" for j in range(classes)]
    box = [
        f"(assert (>= X_{i} {_decimal(low)}))\n(assert (<= X_{i} {_decimal(high)}))"
        for i, (low, high) in enumerate(zip(lower, upper, strict=True))
    ]
    rivals = "\n".join(f"  (and (>= Y_{j} Y_{label}))" for j in range(classes) if j != label)
    return "\n".join([f"; {note}, label {label}", *declared, *box, f"(assert (or\n{rivals}\n))", ""])


def _decimal(value: float) -> str:
    """Without an exponent, which VNN-LIB readers need not know; every place of it, so that the box is the same."""
    return format(Decimal(value), "f")
