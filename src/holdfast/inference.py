"""Running somebody's module without leaving a trace: modes, gradients, seeds, and the checks at the door."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.threat import Threat


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every submodule in eval mode; afterwards each in the mode it had, also after an exception."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def copied_inputs(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A forward pre-hook that hands the module copies of the tensors it is given."""
    if torch.compiler.is_exporting():  # a graph of its own, which runs on nobody's tensors
        return None
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in inputs)


@contextlib.contextmanager
def own_inputs(model: nn.Module) -> Iterator[None]:
    """Every call of the model gets a copy of its inputs: a forward that works in place alters nobody's tensors, and
    no leaf of a gradient. What is copied from the model in here keeps to that for good."""
    if copied_inputs in model._forward_pre_hooks.values():
        yield
        return
    # By way of nn.Module, because TorchScript hides the method; its calls run the hook all the same.
    handle = nn.Module.register_forward_pre_hook(model, copied_inputs, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def frozen_eval(model: nn.Module) -> Iterator[None]:
    """Eval mode with frozen parameters and ``own_inputs``; afterwards the model is what it was.

    Weights that torch.func put in place of the parameters follow from others and cannot be frozen; they stay.
    """
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters() if parameter.is_leaf]
    with eval_mode(model), own_inputs(model):
        try:
            for parameter, _ in required:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, requires_grad in required:
                parameter.requires_grad_(requires_grad)


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several integers; close inputs give unrelated seeds."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def example_generators(seed: int, indices: Sequence[int] | Tensor, *salt: int) -> list[torch.Generator]:
    """One CPU generator per example; what example i draws depends on (seed, i) and the salt only."""
    numbers = indices.tolist() if isinstance(indices, Tensor) else indices
    return [torch.Generator().manual_seed(mix_seed(seed, index, *salt)) for index in numbers]


def fingerprint(*parts: object) -> str:
    """A short digest of tensors, of a module's whole state, and of whatever else by its text."""
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        if isinstance(part, nn.Module):
            for name, value in part.state_dict().items():
                digest.update(f"{name} {fingerprint(value)}".encode())
        elif isinstance(part, Tensor):
            digest.update(f"{tuple(part.shape)} {part.dtype}".encode())
            digest.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the CPU where there is none."""
    for tensor in [*model.parameters(), *model.buffers()]:
        return tensor.device
    return torch.device("cpu")


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, batch_size: int = 256) -> Tensor:
    """Logits (N, K) of the model as it stands, in batches, without gradient."""
    with own_inputs(model):
        logits = [model(batch) for batch in x.split(batch_size)]
    if not all(isinstance(part, Tensor) for part in logits):
        raise ValueError(f"expected a tensor of logits (N, K), the model gave {type(logits[0]).__name__}")
    return torch.cat(logits)


def check_inputs(x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """The labels as int64; refuses what no classifier in [low, high] should be asked about.

    Raises:
        ValueError: not a batch (N, ...) of float32 or float64; NaN or inf; outside the box; labels not (N,)
            integers ≥ 0. Half precision is refused: what it rounds away is larger than a certificate's margin.
    """
    if x.dim() < 2 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"expected a batch (N, ...) of float32 or float64 inputs, given {tuple(x.shape)} of {x.dtype}"
            + ("; divide uint8 images by 255" if x.dtype == torch.uint8 else "")
        )
    if y.shape != x.shape[:1] or y.is_floating_point() or y.dtype == torch.bool:
        raise ValueError(f"expected {len(x)} integer labels (N,), given {tuple(y.shape)} of {y.dtype}")
    y = y.long()
    if len(x) == 0:
        return y
    if not torch.isfinite(x).all():
        raise ValueError("inputs hold NaN or inf")
    smallest, largest = x.min().item(), x.max().item()
    if smallest < threat.low or largest > threat.high:
        raise ValueError(
            f"inputs lie in [{smallest:g}, {largest:g}], the threat's box is [{threat.low:g}, {threat.high:g}]; "
            "images live in [0, 1] and normalisation is the model's first layer"
        )
    if y.min() < 0:
        raise ValueError(f"labels must be ≥ 0, given {y.min().item()}")
    return y


def check_logits(logits: Tensor, y: Tensor) -> None:
    """Refuse a model that does not answer with finite logits (N, K) for every label in 0..K−1.

    Raises:
        ValueError: wrong shape, or a label ≥ K.
        FloatingPointError: NaN or inf, naming the first example.
    """
    if logits.dim() != 2 or len(logits) != len(y) or logits.shape[1] < 2:
        given = tuple(logits.shape)
        raise ValueError(f"expected logits (N, K) of K ≥ 2 classes for {len(y)} inputs, the model gave {given}")
    if len(y) and y.max() >= logits.shape[1]:
        raise ValueError(f"label {y.max().item()} does not fit a model of {logits.shape[1]} classes")
    finite = torch.isfinite(logits).all(1)
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise FloatingPointError(f"the model's logits are not finite for example {first} of {len(y)}")
