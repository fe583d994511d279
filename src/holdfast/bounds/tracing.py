"""The calls that a module makes, as a graph of torch.fx: our own layers whole, compiled ones as what they compile.

Three ways, each for what the one before cannot follow: symbols; symbols that know the shapes of a sample, so that a
forward may branch on them; and ``torch.export``, which sees through every layer.
"""

from __future__ import annotations

import contextlib
import operator as python
import sys
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.nn.utils.parametrize import type_before_parametrizations

from holdfast.bounds.calls import TRACED_THROUGH
from holdfast.bounds.operators import UnsupportedOperator
from holdfast.bounds.rules import MODULES, REGISTERED
from holdfast.inference import copied_inputs
from holdfast.layers import InPieces


def calls_of(model: nn.Module, sample: Tensor, whole: bool) -> tuple[nn.Module, fx.Graph, list[Any]]:
    """The graph of a module, what its names are of, and what it takes as inputs.

    Args:
        whole: keep every layer with a rule whole, whatever that refuses.

    Raises:
        UnsupportedOperator: none of the ways leads through the forward.
    """
    own = _own_functions()
    try:
        return model, _Tracer(autowrap_functions=own).trace(model), [sample]
    except UnsupportedOperator:
        raise
    except Exception as fault:  # whatever a foreign forward does to symbolic values
        first = fault
    tracer = _ShapedTracer(sample.clone(), own)
    try:
        return model, tracer.trace(model), [sample]
    except UnsupportedOperator:
        raise
    except Exception as fault:
        if whole:
            raise UnsupportedOperator(
                f"bounds on the batch statistics of {type(model).__name__} need a forward that torch.fx can "
                f"trace: {first}"
            ) from fault
        return _export(model, sample, f"{_line(fault)}{tracer.whereabouts}")


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """What the caller compiled runs as it was written."""
    if "torch._dynamo" not in sys.modules:  # nothing can have been compiled
        yield
        return
    with torch.compiler.set_stance("force_eager"), torch._dynamo.config.patch(error_on_nested_fx_trace=False):
        yield


def without_compilation(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` was given."""
    original: nn.Module = getattr(module, "_orig_mod", module) if _is_compiled(module) else module
    return original


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod")


def _is_guard(module: nn.Module) -> bool:
    """Whether it compares the input of an exported program with what was exported, and computes nothing."""
    return type(module).__name__ == "GuardsFn"


class _Proxy(fx.Proxy):
    """Writes ``h += x`` down as what it is; fx by itself would take it for ``h = h + x``."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", python.iadd, (self, other), {})

    def __isub__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", python.isub, (self, other), {})

    def __imul__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", python.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", python.itruediv, (self, other), {})


class _Tracer(fx.Tracer):
    whereabouts = ""
    """Of the innermost module that raised."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        kind = type_before_parametrizations(m)
        return kind in MODULES or (kind not in TRACED_THROUGH and super().is_leaf_module(m, module_qualified_name))

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if _is_compiled(m):
            return without_compilation(m)(*args, **kwargs)
        if _is_guard(m):
            return None
        if isinstance(m, InPieces):
            return m.network(*args, **kwargs)
        compiled = m._compiled_call_impl is not None and not self.is_leaf_module(m, "")
        if compiled or any(map(_only_checks, m._forward_pre_hooks.values())):
            forward = m.forward  # not through what module.compile() or torch.export hung on it
        try:
            return super().call_module(m, forward, args, kwargs)
        except UnsupportedOperator:
            raise
        except Exception:
            self.whereabouts = self.whereabouts or f", in {self.path_of_module(m)!r} ({type(m).__name__})"
            raise


class _ShapedProxy(_Proxy):
    """Knows the shape of what it stands for, as the sample has it."""

    @property
    def _value(self) -> Any:
        assert isinstance(self.tracer, _ShapedTracer)
        return self.tracer.values[self.node]

    @property
    def shape(self) -> torch.Size:
        return self._value.shape

    @property
    def ndim(self) -> int:
        return self._value.ndim

    @property
    def dtype(self) -> torch.dtype:
        return self._value.dtype

    @property
    def device(self) -> torch.device:
        return self._value.device

    def size(self, *dim: int) -> Any:
        return self._value.size(*dim)

    def dim(self) -> int:
        return self._value.dim()

    def numel(self) -> int:
        return self._value.numel()

    def is_floating_point(self) -> bool:
        return self._value.is_floating_point()

    def __len__(self) -> int:
        return len(self._value)

    def __iter__(self) -> Iterator[Any]:
        return (python.getitem(self, place) for place in range(len(self._value)))


class _ShapedTracer(_Tracer):
    """Computes along on a sample; what the forward does with values, beside shapes, it still cannot follow."""

    def __init__(self, sample: Tensor, own: tuple[Callable[..., Any], ...]) -> None:
        super().__init__(autowrap_functions=own)
        self.sample = sample
        self.values: dict[fx.Node, Any] = {}
        self.computing = False
        """Whether what is called are the sample's own numbers, not to be written down."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _ShapedProxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.computing else super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return forward(*args, **kwargs) if self.computing else super().call_module(m, forward, args, kwargs)

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: str | None = None, type_expr: Any = None
    ) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if kind == "placeholder":
            self.values[node] = self.sample
        elif kind != "output":
            given, named = fx.node.map_arg((args, kwargs), self.values.__getitem__)
            self.computing = True
            try:
                with torch.no_grad():
                    self.values[node] = self._computed(kind, target, given, named)
            finally:
                self.computing = False
        return node

    def _computed(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "call_function":
            return target(*args, **kwargs)
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        found: Any = self.root
        for part in str(target).split("."):
            found = getattr(found, part)
        return found(*args, **kwargs) if kind == "call_module" else found


def _own_functions() -> tuple[Callable[..., Any], ...]:
    """Functions in Python with a rule, which are not to be traced through."""
    return tuple(kind for kind in REGISTERED if isinstance(kind, FunctionType))


def _export(model: nn.Module, sample: Tensor, fault: str) -> tuple[nn.Module, fx.Graph, list[Any]]:
    """The graph of ``torch.export``, which follows Python control flow that symbolic tracing cannot."""
    try:
        program = torch.export.export(model, (sample,))
    except Exception as second:
        raise UnsupportedOperator(
            f"{type(model).__name__} cannot be traced: {fault} (torch.export: {_line(second)}); bounds need a "
            "forward whose path does not depend on the values of its input: torch.where, clamp or maximum say "
            "such a choice entry by entry"
        ) from second
    state = {**program.state_dict, **program.constants}
    state.update(dict(model.named_parameters()) | dict(model.named_buffers()))
    inputs = [
        sample if spec.kind.name == "USER_INPUT" else state[str(spec.target)]
        for spec in program.graph_signature.input_specs
    ]
    return program.graph_module, program.graph_module.graph, inputs


def _line(fault: Exception) -> str:
    return (str(fault).strip().splitlines() or [type(fault).__name__])[0]


def refuse_what_tracing_skips(model: nn.Module) -> None:
    """Hooks, TorchScript, a forward that is not the class's."""
    hooks = [*model._forward_pre_hooks.values(), *model._forward_hooks.values()]
    seen = all(hook is copied_inputs or _only_checks(hook) for hook in hooks)
    if not seen or _global_forward_hooks or _global_forward_pre_hooks:
        raise UnsupportedOperator("the module has forward hooks, which bounds cannot see; remove them")
    for name, module in model.named_modules():
        place = repr(name or "the module itself")
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedOperator(
                f"TorchScript hides the operators of {place}; give the module that it was made from, or its ONNX "
                "or torch.export file"
            )
        forward = vars(module).get("forward")
        if forward is not None and not (_is_compiled(module) or _is_guard(module) or _is_own(forward, module)):
            raise UnsupportedOperator(f"the forward of {place} was replaced on the instance")


def _only_checks(hook: Any) -> bool:
    """Whether a hook is torch.export's, which compares the input with what was exported."""
    return str(getattr(hook, "__module__", "")).startswith("torch.export")


def _is_own(forward: Any, module: nn.Module) -> bool:
    """Whether it is the class's forward of this module, compiled or not."""
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)
    return getattr(forward, "__self__", None) is module and forward.__func__ is type(module).forward
