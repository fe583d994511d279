"""The penultimate features of any module: the input of the last linear layer it calls; other layers' outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from holdfast.component import nearest
from holdfast.inference import own_inputs


@dataclass(frozen=True)
class Features:
    """What the last linear layer of a forward pass read and wrote."""

    features: Tensor
    """(N, d)."""
    logits: Tensor
    """What the module answered, (N, K)."""
    head: nn.Linear
    """The layer itself."""


def features(model: nn.Module) -> Callable[[Tensor], Features]:
    """A function from inputs to the penultimate features, with gradient and in the module's own mode.

    >>> features(model)(x).features    # doctest: +SKIP

    The function raises:
        ValueError: the forward calls no linear layer, or its input is not one vector per example.
    """

    def extract(x: Tensor) -> Features:
        seen: list[tuple[nn.Linear, Tensor]] = []

        def record(module: nn.Linear, args: tuple[Tensor, ...]) -> None:
            seen.append((module, args[0]))

        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        hooks = [module.register_forward_pre_hook(record) for module in linear]
        try:
            with own_inputs(model):
                logits = model(x)
        finally:
            for hook in hooks:
                hook.remove()
        if not seen:
            raise ValueError(
                f"{type(model).__name__} calls no linear layer: name the head, whose input are the features"
            )
        head, inputs = seen[-1]
        if inputs.dim() != 2 or len(inputs) != len(x):
            raise ValueError(f"the last linear layer reads {tuple(inputs.shape)}, not one vector per example")
        return Features(inputs, logits, head)

    return extract


@dataclass(frozen=True)
class LayerOutputs:
    """What layers gave for many inputs, one vector each."""

    features: Tensor
    """The input of the head, (N, d)."""
    logits: Tensor
    """(N, K)."""
    head: nn.Module
    """The last linear layer, or the module that was named."""
    layers: dict[str, Tensor]
    """Outputs of the named modules, averaged over space or tokens, (N, channels)."""


@torch.no_grad()
def collect_layers(
    model: nn.Module, x: Tensor, layers: Sequence[str] = (), *, head: str | None = None, batch_size: int = 256
) -> LayerOutputs:
    """Features, logits and outputs of named modules, in batches, in the module's own mode.

    Args:
        layers: paths of modules, as ``named_modules`` has them.
        head: path of the module whose input are the features; the last linear layer that is called by default.

    Raises:
        ValueError: no such module, one that the forward does not call, or no linear layer where none was named.
    """
    modules = dict(model.named_modules())
    modules.pop("")
    for path in (*layers, *([head] if head else [])):
        if path not in modules:
            raise ValueError(f"{path!r} is not a module of {type(model).__name__}; {nearest(path, modules)}")
    seen: dict[str, Tensor] = {}
    parts: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
    extract = None if head else features(model)
    with _recording(modules, layers, head, seen):
        for batch in x.split(batch_size):
            seen.clear()
            found = extract(batch.clone()) if extract else None
            logits = found.logits if found else model(batch.clone())
            for path in (*layers, *([""] if head else [])):
                if path not in seen:
                    raise ValueError(f"the forward pass does not call {path or head!r}")
            last = found.features if found else seen[""]
            parts.append((last, logits, {path: seen[path] for path in layers}))
    module: nn.Module = found.head if found else modules[str(head)]
    columns = {path: torch.cat([part[2][path] for part in parts]) for path in layers}
    return LayerOutputs(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), module, columns)


@contextlib.contextmanager
def _recording(
    modules: dict[str, nn.Module], layers: Sequence[str], head: str | None, seen: dict[str, Tensor]
) -> Iterator[None]:
    """Inside, a forward leaves the vectors of these modules in ``seen``, the head's input under the empty name."""

    def keep(path: str, values: object) -> None:
        if path in seen:
            raise ValueError(f"the forward pass calls {path or head!r} more than once")
        seen[path] = _vectors(path or str(head), values)

    def output(path: str) -> Callable[..., None]:
        return lambda module, args, result: keep(path, result)

    hooks = [modules[path].register_forward_hook(output(path)) for path in layers]
    if head:
        hooks.append(
            modules[head].register_forward_pre_hook(
                lambda module, args, named: keep("", next(iter((*args, *named.values())), None)), with_kwargs=True
            )
        )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _vectors(path: str, values: object) -> Tensor:
    """One vector per example: the mean over space, or over tokens (N, T, d); a copy, it may be overwritten."""
    if not isinstance(values, Tensor) or values.dim() < 2:
        raise ValueError(f"{path!r} gives no tensor (N, channels, ...), but {type(values).__name__}")
    if values.dim() == 3:
        return values.mean(1)
    return values.flatten(2).mean(2) if values.dim() > 3 else values.clone()
