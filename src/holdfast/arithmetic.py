"""The arithmetic that certificates account for, whatever a caller asked of torch."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

PRECISIONS = (
    ("generic", "all"),
    *((backend, part) for backend in ("cuda", "mkldnn") for part in ("all", "matmul", "conv", "rnn")),
)
"""Where torch keeps in what precision float32 products are taken; what is not set follows those before it."""
ONEDNN_MODES = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")
"""Variables by which oneDNN, whatever torch asks of it, takes float32 products in another precision."""


@contextlib.contextmanager
def plain_arithmetic(device: torch.device) -> Iterator[None]:
    """The arithmetic that certificates account for: products in the tensors' own precision, and sums of them.

    In here neither autocast, TF32 nor bfloat16 shortens the operands of a product, by whichever of torch's settings
    they were asked for; convolutions are direct or matrix products, never Winograd's or Fourier's, whose rounding
    is larger; kernels are deterministic where torch has such ones. Afterwards everything is set as it was.

    cuDNN and NNPACK choose algorithms that nobody can ask for, and are off; of oneDNN torch asks direct ones.

    Args:
        device: what is computed on, beside the CPU.
    """
    c, modes = torch._C, [os.environ.get(name, "strict").lower() for name in ONEDNN_MODES]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_float32_products())
        stack.enter_context(_deterministic_kernels())
        stack.enter_context(_set(c._get_cudnn_enabled, c._set_cudnn_enabled, False))
        stack.enter_context(_set(c._get_nnpack_enabled, c._set_nnpack_enabled, False))
        if any(mode != "strict" for mode in modes):
            stack.enter_context(_set(c._get_mkldnn_enabled, c._set_mkldnn_enabled, False))
        for kind in {"cpu", device.type}:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextlib.contextmanager
def _set(read: Callable[[], Any], write: Callable[[Any], None], value: object) -> Iterator[None]:
    """A setting with this value, afterwards with the one that it had."""
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


@contextlib.contextmanager
def _float32_products() -> Iterator[None]:
    """float32 products in float32, by torch's newer settings and by its older ones.

    Both are kept twice and refuse to be read where they disagree, so the newer ones, which can always be read, are
    set first. A setting that follows another reads like the other, unless that is cleared before.
    """
    c, own = torch._C, {}
    for place in PRECISIONS:
        own[place] = c._get_fp32_precision_getter(*place)
        c._set_fp32_precision_setter(*place, "none" if "all" in place else "ieee")
    matmul = torch.get_float32_matmul_precision()
    try:
        convolution = c._get_cudnn_allow_tf32()
    except RuntimeError:  # it disagrees with what was just set, which allows nothing
        convolution = True
    try:
        torch.set_float32_matmul_precision("highest")
        c._set_cudnn_allow_tf32(False)
        for place in PRECISIONS:
            c._set_fp32_precision_setter(*place, "ieee")
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        c._set_cudnn_allow_tf32(convolution)
        for place, precision in own.items():
            c._set_fp32_precision_setter(*place, precision)


@contextlib.contextmanager
def _deterministic_kernels() -> Iterator[None]:
    """Where torch has them, silently; a caller who forbids others altogether keeps to that."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    c = torch._C  # torch.use_deterministic_algorithms imports a compiler
    filled = c._get_deterministic_fill_uninitialized_memory, c._set_deterministic_fill_uninitialized_memory
    with warnings.catch_warnings(), _set(*filled, False):
        warnings.filterwarnings("ignore", message=".*determinis")
        c._set_deterministic_algorithms(True, warn_only=before != (True, False))
        try:
            yield
        finally:
            c._set_deterministic_algorithms(before[0], warn_only=before[1])
