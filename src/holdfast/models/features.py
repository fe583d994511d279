"""The penultimate features of any module: what the linear layer reads that makes the logits; layers' outputs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from holdfast.component import nearest
from holdfast.inference import as_module, door, own_inputs, quiet_door
from holdfast.layers.lipschitz import AffineLinear


@dataclass(frozen=True)
class Features:
    """What the layer that makes the logits read and wrote."""

    features: Tensor
    """(N, d)."""
    logits: Tensor
    """What the module answered, (N, K): the head's own answer to the features."""
    head: nn.Linear
    """The layer itself; of one of our Lipschitz layers the plain layer that it is now."""


def features(model: nn.Module) -> Callable[[Tensor], Features]:
    """A function from inputs to the penultimate features, with gradient and in the module's own mode.

    They are what the head reads: the last linear layer called whose answer, features · weightᵀ + bias, are the
    logits. So no auxiliary classifier and no gate is taken for it, nor a layer whose answer is changed afterwards.

    >>> features(model)(x).features    # doctest: +SKIP

    The function raises:
        ValueError: no linear layer that the forward calls makes the logits from one vector per example.
    """
    model = unwrapped(as_module(model))

    @quiet_door
    def extract(x: Tensor) -> Features:
        calls: list[_Call] = []
        linear = [module for module in model.modules() if isinstance(module, nn.Linear | AffineLinear)]

        def record(
            module: nn.Linear | AffineLinear, args: tuple[Any, ...], named: dict[str, Any], out: Tensor
        ) -> None:
            inputs: Tensor = next(iter((*args, *named.values())))
            calls.append(_Call(module, inputs, _version(inputs), out.dtype))

        hooks = [module.register_forward_hook(record, with_kwargs=True) for module in linear]
        # Weights that are computed, as under spectral_norm, are computed once: for the forward and for the check.
        with parametrize.cached(), uncompiled():
            try:
                with own_inputs(model):
                    logits = model(x)
            finally:
                for hook in hooks:
                    hook.remove()
            for call in reversed(calls):
                if call.makes(logits):
                    return Features(call.features, logits, call.layer())
        raise ValueError(_no_head(model, calls, logits, len(x)))

    return extract


class _Call(NamedTuple):
    """A linear layer and what it was called with."""

    module: nn.Linear | AffineLinear
    features: Tensor
    version: int | None
    """Of the features in memory when they were read."""
    dtype: torch.dtype
    """Of the answer."""

    def layer(self) -> nn.Linear:
        return self.module if isinstance(self.module, nn.Linear) else self.module.freeze()

    @torch.no_grad()
    def makes(self, logits: object) -> bool:
        """Whether the layer's weights make the logits of these features, up to the precision in which they are
        kept; features that were overwritten since do not count."""
        module, features = self.module, self.features
        weight = module.weight if isinstance(module, nn.Linear) else module.effective_weight()
        rows = (len(features), len(weight))
        if not isinstance(logits, Tensor) or features.dim() != 2 or logits.shape != rows:
            return False
        if _version(features) != self.version:
            return False
        kinds = (features.dtype, weight.dtype, self.dtype, logits.dtype)
        coarsest = max(torch.finfo(kind).eps for kind in kinds)
        with torch.autocast(logits.device.type, enabled=False):
            wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
            inputs, matrix = features.to(wide), weight.to(wide)
            bias = matrix.new_zeros(len(matrix)) if module.bias is None else module.bias.to(wide)
            found = F.linear(inputs, matrix, bias)
            size = F.linear(inputs.abs(), matrix.abs(), bias.abs())
        finite = logits.isfinite()
        error = (logits.to(wide) - found).abs().where(finite, 0)
        return bool((finite == found.isfinite()).all() and (error <= max(16 * coarsest, 1e-5) * size).all())


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _no_head(model: nn.Module, calls: list[_Call], logits: object, count: int) -> str:
    """Why no layer is the head."""
    name, remedy = type(model).__name__, "name the head, whose input are the features"
    if not calls:
        return f"{name} calls no linear layer: {remedy}"
    paths = {module: path for path, module in model.named_modules()}
    last = calls[-1]
    what = f"the last linear layer that {name} calls, {paths[last.module]!r},"
    if last.features.dim() != 2 or len(last.features) != count:
        return f"{what} reads {tuple(last.features.shape)}, not one vector per example: {remedy}"
    given = f"{tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
    return (
        f"no linear layer of {name} makes its logits, {given}: {what} does not, or its answer or its input is "
        f"changed afterwards, as by a softmax, a scale or a normalised weight; {remedy}"
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """The module within ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile``."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def uncompiled() -> contextlib.AbstractContextManager[object]:
    """Inside, what was compiled runs as it is written: compiled code passes by hooks that come and go."""
    stance: Any = torch.compiler.set_stance
    return stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


@dataclass(frozen=True)
class LayerOutputs:
    """What layers gave for many inputs, one vector each."""

    features: Tensor
    """The input of the head, (N, d)."""
    logits: Tensor
    """(N, K)."""
    head: nn.Module
    """The linear layer that makes the logits, or the module that was named."""
    layers: dict[str, Tensor]
    """Outputs of the named modules, averaged over space or tokens, (N, channels)."""


@door
@torch.no_grad()
def collect_layers(
    model: nn.Module, x: Tensor, layers: Sequence[str] = (), *, head: str | None = None, batch_size: int = 256
) -> LayerOutputs:
    """Features, logits and outputs of named modules, in batches, in the module's own mode.

    Args:
        layers: paths of modules, as ``named_modules`` has them.
        head: path of the module whose input are the features; by default the linear layer that makes the logits.

    Raises:
        ValueError: no such module, one that the forward does not call, or no head where none was named.
    """
    inner = unwrapped(model)
    modules = {**dict(inner.named_modules()), **dict(model.named_modules())}  # by either name
    modules.pop("")
    model = inner
    for path in (*layers, *([head] if head else [])):
        if path not in modules:
            raise ValueError(f"{path!r} is not a module of {type(model).__name__}; {nearest(path, modules)}")
    seen: dict[str, Tensor] = {}
    parts: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
    extract = None if head else features(model)
    with _recording(modules, layers, head, seen), uncompiled():
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
