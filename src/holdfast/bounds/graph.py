"""Any module as a short list of operators: traced once, normalised, checked against the module itself."""

from __future__ import annotations

import contextlib
import operator as python
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.utils import _pytree

from holdfast.bounds.attention import multihead_attention
from holdfast.bounds.calls import TRACED_THROUGH, Argument, Call, Steps
from holdfast.bounds.functions import FUNCTIONS
from holdfast.bounds.heads import without_heads
from holdfast.bounds.interval import Interval, rule
from holdfast.bounds.kinds import batch_norm
from holdfast.bounds.operators import (
    Affine,
    Graph,
    Monotone,
    Node,
    Operator,
    Softmax,
    UnsupportedOperator,
    apply,
    outside_inference_mode,
    walk,
)
from holdfast.bounds.rules import MODULES, REGISTERED
from holdfast.bounds.trial import try_once
from holdfast.fold import BATCH_NORMS
from holdfast.inference import copied_inputs, eval_mode, masked_classes, weights_named

_TAKE_INPLACE = {"relu", "relu6", "leaky_relu", "hardtanh", "elu", "dropout"}
_SHAPE_METHODS = {"size", "dim", "ndimension", "numel", "__len__"}

Statistics = dict[nn.Module, tuple[Tensor, Tensor]]
"""Mean and biased variance that each BatchNorm saw in a training forward."""


def trace(
    model: nn.Module,
    x: Tensor,
    statistics: Statistics | None = None,
    *,
    box: tuple[Tensor, Tensor] | None = None,
) -> Graph:
    """The operators of ``model`` in eval mode, on live (differentiable) parameters.

    The graph is compared with the module itself on x, on points scattered around it and on two corners of
    the box, so that what a trace cannot see (an alias, a branch on values) shows where it has an effect.

    Args:
        x: a batch of inputs, (N, ...); two of them are used to learn the shapes.
        statistics: what each BatchNorm normalises with, in place of its running statistics; no comparison then.
        box: lower and upper bounds of what will be asked, for the comparison.

    Raises:
        UnsupportedOperator: an operator without a bound rule, by module path and name; or a module whose
            normalised form does not reproduce its own output.
    """
    model = getattr(model, "_orig_mod", model)  # under torch.compile
    _refuse_what_tracing_skips(model)
    with outside_inference_mode():
        sample = x[[0, -1]].detach().clone() if len(x) else x.new_zeros(2, *x.shape[1:])
    with eval_mode(model), torch.no_grad():
        try:
            root, calls = model, _Tracer(autowrap_functions=_own_functions()).trace(model)
            inputs: list[Any] = [sample]
        except UnsupportedOperator:
            raise
        except Exception as fault:  # whatever a foreign forward does to symbolic values
            if statistics:
                raise UnsupportedOperator(
                    f"bounds on the batch statistics of {type(model).__name__} need a forward that torch.fx can "
                    f"trace: {fault}"
                ) from fault
            root, inputs = _export(model, sample, fault)
            calls = root.graph
    normaliser = _Normaliser(root, calls, sample, statistics)
    with weights_named(model, sample), eval_mode(model), outside_inference_mode():
        normaliser.run(*inputs)
        graph = without_heads(Graph(normaliser.nodes[: normaliser.last], tuple(sample.shape[1:])))
        if statistics is None and len(x):
            _check(graph, model, torch.cat([x.detach(), *(box or ())]))
    return graph


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
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        kind = type_before_parametrizations(m)
        return kind in MODULES or (kind not in TRACED_THROUGH and super().is_leaf_module(m, module_qualified_name))


def _own_functions() -> tuple[Callable[..., Any], ...]:
    """Functions in Python with a rule, which are not to be traced through."""
    return tuple(kind for kind in REGISTERED if isinstance(kind, FunctionType))


def _export(model: nn.Module, sample: Tensor, fault: Exception) -> tuple[fx.GraphModule, list[Any]]:
    """The graph of ``torch.export``, which follows Python control flow that symbolic tracing cannot."""
    try:
        program = torch.export.export(model, (sample,))
    except Exception as second:
        raise UnsupportedOperator(
            f"{type(model).__name__} cannot be traced: {fault} (torch.export: {str(second).splitlines()[0]})"
        ) from second
    state = {**program.state_dict, **program.constants}
    state.update(dict(model.named_parameters()) | dict(model.named_buffers()))
    inputs = [
        sample if spec.kind.name == "USER_INPUT" else state[str(spec.target)]
        for spec in program.graph_signature.input_specs
    ]
    return program.graph_module, inputs


class _Normaliser(fx.Interpreter):
    """Runs a traced graph on a sample and writes down the operator of every call that an activation enters."""

    def __init__(self, root: nn.Module, calls: fx.Graph, sample: Tensor, statistics: Statistics | None) -> None:
        super().__init__(root, graph=calls)
        self.extra_traceback = False
        self.sample, self.statistics = sample, statistics
        self.nodes: list[Node] = []
        self.value_of: dict[fx.Node, int] = {}
        self.order = {node: number for number, node in enumerate(calls.nodes)}
        self.last = 0

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            return self._output(n)
        shared = self._values_sharing_memory(n) if self._is_in_place(n) else []
        value = super().run_node(n)
        if n.op == "placeholder":
            if value is self.sample:
                self.value_of[n] = 0
            return value
        leaves = _pytree.tree_leaves((n.args, n.kwargs))
        sources = [leaf for leaf in leaves if isinstance(leaf, fx.Node) and leaf in self.value_of]
        if n.target is python.getitem and sources and isinstance(self.env[sources[0]], tuple):
            if n.args[1] != 0:
                raise UnsupportedOperator(
                    f"no bound rule at {_place(n)}: only the first of several results has one"
                )
            self.value_of[n] = self.value_of[sources[0]]
            return value
        if sources and not _asks_for_shape(n):
            try:
                self._refuse_hidden_change(n, shared)
                operator = self._operator(n, value)
                if isinstance(operator, Affine | Monotone) and len(sources) > 1:
                    raise UnsupportedOperator("more than one of its arguments depends on the input")
                result = value[0] if isinstance(value, tuple) and isinstance(operator, Steps) else value
                if not isinstance(result, Tensor) or result.shape[:1] != self.sample.shape[:1]:
                    raise UnsupportedOperator("it does not keep the batch dimension first")
                if isinstance(operator, Softmax) and operator.dim % result.dim() == 0:
                    raise UnsupportedOperator("a softmax over the examples of the batch has no rule")
            except UnsupportedOperator as fault:
                raise UnsupportedOperator(f"no bound rule at {_place(n)}: {fault}") from None
            self.value_of[n] = self._written_down(operator, sources, _place(n), result)
        return value

    def _written_down(self, operator: Operator, sources: list[fx.Node], place: str, value: Tensor) -> int:
        """The number of the value that the nodes of an operator, or of several in its place, end in."""
        numbers = [self.value_of[source] for source in sources]
        if not isinstance(operator, Steps):
            self.nodes.append(Node(operator, tuple(numbers), place, tuple(value.shape[1:])))
            return len(self.nodes)
        values = [self.env[source] for source in sources]
        for step, inputs in operator.steps:
            values.append(apply(step, *(values[i] for i in inputs)))
            self.nodes.append(Node(step, tuple(numbers[i] for i in inputs), place, tuple(values[-1].shape[1:])))
            numbers.append(len(self.nodes))
        return numbers[-1]

    def _values_sharing_memory(self, n: fx.Node) -> list[fx.Node]:
        """Earlier values that an operation in place changes along with its argument."""
        if not n.all_input_nodes:
            return []
        changed = self.env[n.all_input_nodes[0]].untyped_storage().data_ptr()
        tensors = [(node, value) for node, value in self.env.items() if isinstance(value, Tensor)]
        return [node for node, value in tensors if value.untyped_storage().data_ptr() == changed]

    def _refuse_hidden_change(self, n: fx.Node, shared: list[fx.Node]) -> None:
        if any(self.order[user] > self.order[n] for node in shared for user in node.users):
            raise UnsupportedOperator("it works in place on a value that is read again later")

    def _is_in_place(self, n: fx.Node) -> bool:
        """Whether a call also changes what later calls read under the old name."""
        if n.op in ("placeholder", "get_attr", "output"):
            return False
        if n.op == "call_module":
            return bool(getattr(self.fetch_attr(str(n.target)), "inplace", False))
        name = (str(n.target) if n.op == "call_method" else getattr(n.target, "__name__", "")).split(".")[0]
        named = name.endswith("_") and not name.endswith("__")
        asked = bool(n.kwargs.get("inplace")) or (name in _TAKE_INPLACE and any(a is True for a in n.args[1:]))
        return named or asked or n.target in (python.iadd, python.isub, python.imul, python.itruediv)

    def _operator(self, n: fx.Node, value: Any) -> Operator:
        if n.op == "call_module":
            module = self.fetch_attr(str(n.target))
            if module._forward_hooks or module._forward_pre_hooks:
                raise UnsupportedOperator("the module has forward hooks, which bounds cannot see; remove them")
            kind = type_before_parametrizations(module)
            if kind in BATCH_NORMS:
                mean, var = (self.statistics or {}).get(module, (module.running_mean, module.running_var))
                return batch_norm(module, mean, var)
            if kind is nn.MultiheadAttention:
                sources = [leaf for leaf in _pytree.tree_leaves((n.args, n.kwargs)) if leaf in self.value_of]
                shapes = [tuple(self.env[source].shape[1:]) for source in sources]
                return multihead_attention(
                    module, shapes, {**n.kwargs, "attn_mask": n.kwargs.get("attn_mask", n.args[3:] or None)}
                )
            if kind in MODULES:
                return self._tried(n, kind, MODULES[kind](module), module)
            raise UnsupportedOperator(_remedy(kind.__name__))
        function: Any = getattr(Tensor, str(n.target)) if n.op == "call_method" else n.target
        if function not in FUNCTIONS:
            raise UnsupportedOperator(_remedy(_name(function)))
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        activations = {id(self.env[source]) for source in n.all_input_nodes if source in self.value_of}
        args, kwargs = _pytree.tree_map(lambda a: Argument(a) if id(a) in activations else a, (args, kwargs))
        call = Call(function, args, kwargs, value)
        return self._tried(n, function, FUNCTIONS[function](call), call)

    def _tried(self, n: fx.Node, kind: Any, operator: Operator, function: Callable[[Tensor], Tensor]) -> Operator:
        """The operator, which is tried if its rule is a user's and it has one input; in training it is not."""
        sources = [source for source in n.all_input_nodes if source in self.value_of]
        if kind in REGISTERED and self.statistics is None and len(sources) == 1:
            registered = f"the rule registered for {_name(kind)}"
            try:
                try_once(operator, function, self.env[sources[0]])
            except UnsupportedOperator as fault:
                raise UnsupportedOperator(f"{registered} does not hold: {fault}") from None
            except RuntimeError as fault:
                raise UnsupportedOperator(f"{registered} cannot be tried on other inputs: {fault}") from fault
        return operator

    def _output(self, n: fx.Node) -> Any:
        result = n.args[0]
        result = result[0] if isinstance(result, tuple | list) and len(result) == 1 else result
        if not isinstance(result, fx.Node) or not self.value_of.get(result):
            raise UnsupportedOperator("the module does not end in one tensor of logits computed from its input")
        self.last = self.value_of[result]
        return self.env[result]


def _asks_for_shape(n: fx.Node) -> bool:
    """Whether a call returns the shape of an activation, not something computed from its values."""
    if n.op == "call_function" and n.target is getattr:
        return n.args[1] in ("shape", "dtype", "device", "ndim")
    return n.op == "call_method" and n.target in _SHAPE_METHODS


def _place(n: fx.Node) -> str:
    stack = n.meta.get("nn_module_stack")
    path = str(n.target) if n.op == "call_module" else (list(stack.values())[-1][0] if stack else "")
    return repr(path or "the module itself") + ("" if n.op == "call_module" else f" ({n.name})")


def _name(kind: Any) -> str:
    """As somebody writes it who registers a rule."""
    if isinstance(kind, torch._ops.OpOverload):
        return f"torch.ops.{kind}"
    name: str = getattr(kind, "__name__", str(kind))
    method = getattr(kind, "__qualname__", "").startswith(("TensorBase.", "Tensor."))
    return f"torch.Tensor.{name}" if method else name


def _remedy(name: str) -> str:
    return (
        f"operator {name} is unknown; holdfast.bounds.register({name}, rule) teaches it, for a function that "
        "increases in every input with the rule holdfast.bounds.Monotone"
    )


def _refuse_what_tracing_skips(model: nn.Module) -> None:
    before = set(model._forward_pre_hooks.values()) - {copied_inputs}
    if model._forward_hooks or before or _global_forward_hooks or _global_forward_pre_hooks:
        raise UnsupportedOperator("the module has forward hooks, which bounds cannot see; remove them")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedOperator(
                f"TorchScript hides the operators of {name or 'the module itself'!r}; give the module that it was "
                "made from"
            )
        if "forward" in vars(module):
            raise UnsupportedOperator(
                f"the forward of {name or 'the module itself'!r} was replaced on the instance"
            )


def _check(graph: Graph, model: nn.Module, points: Tensor) -> None:
    """The graph at single points must be the module, also in a batch of another size than the sample's.

    Where it gives NaN or inf, as a weight may, no bound comes of it.
    """
    generator = torch.Generator().manual_seed(0)
    scattered = points[:1] + torch.randn(6, *points.shape[1:], generator=generator).to(points)
    points = torch.cat([points, scattered])
    with torch.no_grad():
        logits = model(points.clone())
        if masks := masked_classes(logits):
            raise UnsupportedOperator(f"bounds have no word for -inf: {masks}")
        try:
            traced = walk(graph, {0: Interval.point(points)}, lambda number, operator, *v: rule(operator, *v))[
                len(graph.nodes)
            ].centre
            for head in graph.heads:
                traced = apply(head, traced)
        except RuntimeError as fault:
            raise UnsupportedOperator(
                f"{type(model).__name__} computes something from the size of the batch: {fault}"
            ) from fault
    if traced.shape != logits.shape or not torch.allclose(
        traced, logits.where(traced.isfinite(), traced), rtol=0, atol=_rounding(logits), equal_nan=True
    ):
        raise UnsupportedOperator(
            f"the operators traced from {type(model).__name__} do not reproduce its output; does its forward "
            "change a tensor in place that it reads again, or depend on the values it is given?"
        )


def _rounding(logits: Tensor) -> float:
    """What two orders of the same arithmetic may differ by: little of the spread, less of the size."""
    finite = logits[logits.isfinite()].double()
    if not len(finite):
        return 0.0
    return float(1e-3 * (finite - finite.mean()).abs().max() + 1e-5 * finite.abs().max())


@contextlib.contextmanager
def batch_statistics(model: nn.Module) -> Iterator[Statistics]:
    """Collects what each BatchNorm in train mode normalises with, during the one training forward.

    The mean and biased variance are differentiable, so that bounds computed with them are too.
    """
    statistics: Statistics = {}

    def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if module.training:
            if module in statistics:
                raise UnsupportedOperator("a BatchNorm that is called twice has no single batch statistics")
            x = args[0]
            dims = [0, *range(2, x.dim())]
            statistics[module] = (x.mean(dims), x.var(dims, correction=0))

    hooks = [m.register_forward_pre_hook(record) for m in model.modules() if isinstance(m, BATCH_NORMS)]
    # A compiled model does not notice hooks that come and go.
    eager = torch.compiler.set_stance("force_eager") if hooks else contextlib.nullcontext()
    try:
        with eager:
            yield statistics
    finally:
        for hook in hooks:
            hook.remove()
