"""Running somebody's module without leaving a trace: modes, gradients, seeds, and the checks at the door."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.arithmetic import plain_arithmetic as plain_arithmetic
from holdfast.doors import as_inputs as as_inputs
from holdfast.doors import as_labels as as_labels
from holdfast.doors import as_module as as_module
from holdfast.doors import door as door
from holdfast.doors import quiet_door as quiet_door
from holdfast.doors import side_door as side_door
from holdfast.threat import Threat

TORCH = Path(torch.__file__).parent


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every submodule in eval mode; afterwards each in the mode it had, also after an exception.

    What is frozen or exported has the one mode that it was made in, and keeps it.
    """
    modes = [(module, module.training) for module in model.modules() if hasattr(module, "training")]
    try:
        model.eval()
    except NotImplementedError:  # of a part that torch.export made
        for module, _ in modes:
            module.training = False
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


@contextlib.contextmanager
def without_trace(model: nn.Module) -> Iterator[None]:
    """Afterwards the model's buffers and extra states and the global random state are what they were."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    stateful = [m for m in model.modules() if type(m).get_extra_state is not nn.Module.get_extra_state]
    extra = [(module, copy.deepcopy(module.get_extra_state())) for module in stateful]
    device = device_of(model)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for module, state in extra:
            module.set_extra_state(state)


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several integers; close inputs give unrelated seeds."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def fingerprint(*parts: object) -> str:
    """A short digest of tensors, of a module's whole state, and of whatever else by its text."""
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        if isinstance(part, torch.jit.ScriptModule):  # frozen, it has no state
            digest.update(part.save_to_buffer())
        elif isinstance(part, nn.Module):
            for name, value in part.state_dict().items():
                digest.update(f"{name} {fingerprint(value)}".encode())
        elif isinstance(part, Tensor):
            digest.update(f"{tuple(part.shape)} {part.dtype}".encode())
            digest.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()


def device_of(model: nn.Module, otherwise: torch.device = torch.device("cpu")) -> torch.device:  # noqa: B008
    """The device of the first parameter or buffer; where there is none, the other one."""
    for tensor in [*model.parameters(), *model.buffers()]:
        return tensor.device
    return otherwise


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, batch_size: int = 256) -> Tensor:
    """Logits (N, K) of the model as it stands, in batches, without gradient."""
    return torch.cat([logits_of(model, batch) for batch in x.split(batch_size)])


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """What the model answers to one batch.

    Raises:
        ValueError: the answer is no tensor of real logits, or the module's weights are of another type or on
            another device than its input; says what to do.
    """
    with weights_named(model, x), own_inputs(model):
        logits = model(x)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"expected a tensor of logits (N, K), the model gave {_kind(logits)}; return the logits alone"
            + (", its .logits" if hasattr(logits, "logits") else "")
        )
    if not logits.is_floating_point():
        raise ValueError(f"expected real logits (N, K) in floating point, the model gave {logits.dtype}")
    return logits


@contextlib.contextmanager
def weights_named(model: nn.Module, x: Tensor) -> Iterator[None]:
    """What fails because the model's weights cannot meet this input fails by a ValueError that says so.

    Raises:
        torch.OutOfMemoryError: as it was; fewer inputs may fit (see ``memory.in_pieces``).
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError) as fault:
        if advice := _misplaced(model, x) or _alone(model, x):
            raise ValueError(advice) from fault
        raise


def _alone(model: nn.Module, x: Tensor) -> str | None:
    """In words, a model that takes one input and not several."""
    try:
        with torch.no_grad():
            taken = len(x) > 1 and len(model(x[:1])) == 1
    except Exception:  # the module is the user's, and may fail in any way
        return None
    return (
        "the model takes one input at a time: holdfast.layers.InPieces(model, 1) takes any number"
        if taken
        else None
    )


def _kind(answer: object) -> str:
    """What a module answers in the place of logits, in a few words."""
    if answer is None:
        return "None"
    name = type(answer).__name__
    if isinstance(answer, Mapping):
        return f"{name} of {', '.join(map(str, answer))}" if answer else f"an empty {name}"
    if isinstance(answer, tuple | list):
        return f"{name} of {len(answer)}"
    return name


def _misplaced(model: nn.Module, x: Tensor) -> str | None:
    """In words, weights that cannot meet this input: of another type, or on another device."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()]
    weights = [tensor for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()]
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights if tensor.dtype != x.dtype})
    if kinds:
        own = str(x.dtype).removeprefix("torch.")
        found = f"the model's weights are {' and '.join(kinds)}"
        if any(tensor.is_complex() for tensor in weights):
            return f"{found}, expected real ones of the inputs' {own}"
        remedy = "model.float()" if x.dtype == torch.float32 else "model.double(), or give float32 inputs"
        return f"{found}, its inputs {own}: expected one type; call {remedy}"
    places = sorted({str(tensor.device) for tensor in tensors})
    if places and places != [str(x.device)]:
        if "meta" in places:
            return "the model's weights are on the device meta, where they have no values: load them first"
        found = f"the model is on {' and '.join(places)}, its inputs on {x.device}"
        return f"{found}: expected one device; call model.to({str(x.device)!r})"
    return None


def rehearse(model: nn.Module, x: Tensor, classes: int) -> Tensor:
    """The model's logits for a few images of a data set, or one sentence that says why there are none.

    Raises:
        ValueError: the model takes no such images, whatever its fault; its answer is not logits (see
            ``logits_of``), or has fewer columns than there are classes.
    """
    try:
        logits = logits_of(model, x)
    except (torch.OutOfMemoryError, ValueError, ArithmeticError):
        raise
    except Exception as fault:  # the module is the user's, and may fail in any way
        frames = traceback.extract_tb(fault.__traceback__)
        last = next((frame for frame in reversed(frames) if TORCH not in Path(frame.filename).parents), frames[-1])
        text = f"{type(fault).__name__}: {fault}".strip().removesuffix(":")
        raise ValueError(
            f"the model does not take images of {tuple(x.shape[1:])}: {text} ({last.filename}, line {last.lineno})"
        ) from fault
    check_logits(logits.nan_to_num(), torch.full((len(x),), classes - 1, device=x.device))
    return logits


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
    y = y.long().to(x.device)
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


def check_logits(logits: Tensor, y: Tensor, *, masks: bool = False) -> None:
    """Refuse a model that does not answer with finite logits (N, K) for every label in 0..K−1.

    Args:
        masks: −inf may stand for classes that are never the answer, unless for all of them.

    Raises:
        ValueError: wrong shape, or a label ≥ K.
        FloatingPointError: NaN or inf, naming the first example.
    """
    if logits.dim() != 2 or len(logits) != len(y) or logits.shape[1] < 2:
        given = tuple(logits.shape)
        raise ValueError(f"expected logits (N, K) of K ≥ 2 classes for {len(y)} inputs, the model gave {given}")
    if len(y) and y.max() >= logits.shape[1]:
        raise ValueError(f"label {y.max().item()} does not fit a model of {logits.shape[1]} classes")
    fine = answered(logits)
    if not masks:
        fine &= logits.isfinite().all(1)
    if not fine.all():
        first, why = int((~fine).nonzero()[0]), masked_classes(logits)
        raise FloatingPointError(
            f"the model's logits are not finite for example {first} of {len(y)}" + (f": {why}" if why else "")
        )


def masked_classes(logits: Tensor) -> str:
    """What to do about classes whose logits (N, K) are −inf for every example, where masks have no meaning; empty
    without such."""
    masked = (logits == -torch.inf).all(0).nonzero().flatten().tolist()
    if not masked:
        return ""
    classes = ", ".join(map(str, masked[:10])) + (f" and {len(masked) - 10} more" if len(masked) > 10 else "")
    return (
        f"the logits of class {classes} are -inf for every example; leave masked classes out of the answer, or "
        "give them the finite -1e4"
    )


def answered(logits: Tensor) -> Tensor:
    """Whether logits (N, K) name a class: no NaN, no +inf, and not −inf for every class; (N,) bool."""
    return logits.amax(1).isfinite()
