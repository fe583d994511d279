"""What every test of a family asks: the same answer on the device, from the same question."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from device import host_device
from torch import Tensor


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in an answer, in a fixed order."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors(getattr(value, field.name))
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from tensors(value[key])
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors(each)
    elif isinstance(value, float):
        yield torch.tensor(value)


def answer(question: Callable[[str], Any], device: str) -> list[Tensor] | str:
    """The answer's tensors, or the words in which the question was refused."""
    try:
        return [tensor.detach() for tensor in tensors(question(device))]
    except ValueError as refusal:
        return f"{type(refusal).__name__}: {refusal}"


def agree(question: Callable[[str], Any], *, refuses: bool = False, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """The device must answer as the CPU does, and where the CPU refuses must refuse in the same words.

    Args:
        refuses: whether the CPU may refuse.
    """
    expected, found = answer(question, "cpu"), answer(question, host_device.NAME)
    if isinstance(expected, str) or isinstance(found, str):
        assert expected == found
        assert refuses, f"refused: {expected}"
        return
    assert len(expected) == len(found) > 0
    for one, other in zip(expected, found, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(other.cpu(), one, rtol=rtol, atol=atol, equal_nan=True)
