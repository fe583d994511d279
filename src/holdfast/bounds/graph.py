"""Any module as a short list of operators: traced once, normalised, checked against the module itself."""

from __future__ import annotations

import contextlib
import operator as python
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.utils import _pytree

from holdfast.bounds.attention import multihead_attention
from holdfast.bounds.calls import SAME, Argument, Call, Lowered, Several, Steps
from holdfast.bounds.checks import check, refuse_masks
from holdfast.bounds.functions import FUNCTIONS
from holdfast.bounds.heads import without_heads
from holdfast.bounds.kinds import batch_norm
from holdfast.bounds.nodes import asks_for_shape, name_of, place_of, read_by, remedy
from holdfast.bounds.operators import (
    Affine,
    Elementwise,
    Graph,
    Monotone,
    Node,
    Operator,
    Softmax,
    UnsupportedOperator,
    apply,
    outside_inference_mode,
)
from holdfast.bounds.rules import MODULES, REGISTERED
from holdfast.bounds.tracing import calls_of, refuse_what_tracing_skips, uncompiled, without_compilation
from holdfast.bounds.trial import try_once
from holdfast.bounds.twins import TWINS
from holdfast.fold import BATCH_NORMS
from holdfast.inference import eval_mode, weights_named
from holdfast.layers import InPieces

_TAKE_INPLACE = {"relu", "relu6", "leaky_relu", "hardtanh", "elu", "dropout"}

Statistics = dict[nn.Module, tuple[Tensor, Tensor]]
"""Mean and biased variance that each BatchNorm saw in a training forward."""
Maker = Callable[[Statistics], Operator]
"""Makes an operator again, of the weights of the moment."""


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
    graph, _ = traced(model, x, statistics)
    if statistics is None and len(x):
        model = without_compilation(model)
        with uncompiled(), weights_named(model, x), eval_mode(model), outside_inference_mode():
            check(graph, model, torch.cat([x.detach(), *(box or ())]))
    return graph


def traced(model: nn.Module, x: Tensor, statistics: Statistics | None) -> tuple[Graph, list[Maker | None]]:
    """``trace`` without the comparison, and how its operators are made again; None where that takes a new trace."""
    model = without_compilation(model)
    refuse_what_tracing_skips(model)
    with outside_inference_mode():
        size = max((module.size for module in model.modules() if isinstance(module, InPieces)), default=2)
        sample = x[[0, -1]][torch.arange(size) % 2].detach().clone() if len(x) else x.new_zeros(size, *x.shape[1:])
    with uncompiled():
        with eval_mode(model), torch.no_grad():
            whole = model.network if isinstance(model, InPieces) else model
            root, calls, inputs = calls_of(whole, sample, whole=bool(statistics))
        normaliser = _Normaliser(root, calls, sample, statistics)
        with weights_named(model, sample), eval_mode(model), outside_inference_mode():
            refuse_masks(model, normaliser.run(*inputs))
            kept = _needed(normaliser.nodes, normaliser.last)
            graph = without_heads(_pruned(normaliser.nodes, kept, tuple(sample.shape[1:])))
    return graph, [normaliser.makers[value - 1] for value in kept][: len(graph.nodes)]


def _needed(nodes: list[Node], last: int) -> list[int]:
    """The values that the last one follows from, itself among them, but for the inputs."""
    wanted = {last}
    for number in range(last - 1, -1, -1):
        if number + 1 in wanted:
            wanted.update(nodes[number].inputs)
    return sorted(wanted - {0})


def _pruned(nodes: list[Node], kept: list[int], input_shape: tuple[int, ...]) -> Graph:
    """The nodes of these values alone."""
    numbers = {old: new for new, old in enumerate([0, *kept])}
    found = [nodes[value - 1] for value in kept]
    return Graph([replace(node, inputs=tuple(numbers[i] for i in node.inputs)) for node in found], input_shape)


_Numbers = int | None | tuple[Any, ...]
"""Of the value that a call makes, or of each of several; None for a result without a rule."""


class _Normaliser(fx.Interpreter):
    """Runs a traced graph on a sample and writes down the operator of every call that an activation enters."""

    def __init__(self, root: nn.Module, calls: fx.Graph, sample: Tensor, statistics: Statistics | None) -> None:
        super().__init__(root, graph=calls)
        self.extra_traceback = False
        self.sample, self.statistics = sample, statistics
        self.nodes: list[Node] = []
        self.makers: list[Maker | None] = []
        """Of each node."""
        self.value_of: dict[fx.Node, _Numbers] = {}
        self.order = {node: number for number, node in enumerate(calls.nodes)}
        self.read = read_by(node for node in calls.nodes if node.op == "output" or self._is_in_place(node))
        self.last = 0

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            return self._output(n)
        if n not in self.read and n.op != "placeholder":
            return None
        shared = self._values_sharing_memory(n) if self._is_in_place(n) else []
        value = super().run_node(n)
        if n.op == "placeholder":
            if value is self.sample:
                self.value_of[n] = 0
            return value
        leaves = _pytree.tree_leaves((n.args, n.kwargs))
        if asks_for_shape(n) or not any(isinstance(leaf, fx.Node) and leaf in self.value_of for leaf in leaves):
            return value
        try:
            self._refuse_hidden_change(n, shared)
            self.value_of[n] = self._one_of_several(n, value) if self._selects(n) else self._lowered(n, value)
        except UnsupportedOperator as fault:
            raise UnsupportedOperator(f"no bound rule at {place_of(n)}: {fault}") from None
        return value

    def _selects(self, n: fx.Node) -> bool:
        """Whether a call takes one or more of the results of an earlier one."""
        several = n.args and isinstance(n.args[0], fx.Node) and isinstance(self.value_of.get(n.args[0]), tuple)
        return bool(several) and n.op == "call_function" and n.target in (python.getitem, getattr)

    def _one_of_several(self, n: fx.Node, value: Any) -> _Numbers:
        (source, *_), kept = n.args, {}
        assert isinstance(source, fx.Node)
        numbers = self.value_of[source]
        assert isinstance(numbers, tuple)
        kept = {id(part): number for part, number in zip(self.env[source], numbers, strict=True)}
        if isinstance(value, tuple | list):
            return tuple(kept[id(part)] for part in value)
        if (number := kept[id(value)]) is None:
            raise UnsupportedOperator(
                "only the first of several results has one: where the largest entries are, say, has none"
            )
        return number

    def _lowered(self, n: fx.Node, value: Any) -> _Numbers:
        """The numbers of the values that a call makes, whose operators are written down."""
        sources: list[int] = []
        samples: list[Tensor] = []

        def argument(value: Any, number: _Numbers) -> Any:
            if isinstance(number, tuple):
                return tuple(argument(*pair) for pair in zip(value, number, strict=True))
            if number is None:
                raise UnsupportedOperator("only the first of several results has one")
            sources.append(number)
            samples.append(value)
            return Argument(value, len(sources) - 1)

        def given(node: fx.Node) -> Any:
            value = self.env[node]
            return argument(value, self.value_of[node]) if node in self.value_of else value

        args, kwargs = fx.node.map_arg((n.args, n.kwargs), given)
        made = self._made(n, args, kwargs, value)
        if isinstance(made, Several):
            pairs = list(zip(made.parts, value, strict=True))
            for result in [result for part, result in pairs if part is not None]:
                self._refuse_result(result)
            return tuple(part and self._one(n, part, sources, samples, result) for part, result in pairs)
        self._refuse_result(value)
        if isinstance(made, Softmax) and made.dim % value.dim() == 0:
            raise UnsupportedOperator("a softmax over the examples of the batch has no rule")
        return self._one(n, made, sources, samples, value)

    def _one(self, n: fx.Node, made: Operator, sources: list[int], samples: list[Tensor], result: Tensor) -> int:
        if isinstance(made, Steps):
            return self._steps(n, made, sources, samples)
        if isinstance(made, Affine | Monotone | Elementwise) and len(sources) > 1:
            raise UnsupportedOperator("more than one of its arguments depends on the input")
        return self._written(n, made, tuple(sources), result, alone=True)

    def _refuse_result(self, result: Any) -> None:
        if not isinstance(result, Tensor) or result.shape[:1] != self.sample.shape[:1]:
            raise UnsupportedOperator("it does not keep the batch dimension first")
        if result.dtype != self.sample.dtype:
            raise UnsupportedOperator(
                f"it changes the precision, {self.sample.dtype} to {result.dtype}; give the inputs and the whole "
                "network in one"
            )

    def _written(
        self, n: fx.Node, operator: Operator, inputs: tuple[int, ...], result: Tensor, *, alone: bool = False
    ) -> int:
        if operator is SAME:
            return inputs[0]
        self.makers.append(self._maker(n, operator, alone))
        self.nodes.append(Node(operator, inputs, place_of(n), tuple(result.shape[1:])))
        return len(self.nodes)

    def _steps(self, n: fx.Node, steps: Steps, sources: list[int], samples: list[Tensor]) -> int:
        numbers, values = list(sources), list(samples)
        for operator, places in steps.steps:
            with torch.no_grad():
                values.append(apply(operator, *(values[place] for place in places)))
            numbers.append(self._written(n, operator, tuple(numbers[place] for place in places), values[-1]))
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

    def _made(self, n: fx.Node, args: Any, kwargs: Any, value: Any) -> Lowered:
        if n.op == "call_module":
            module = self.fetch_attr(str(n.target))
            if module._forward_hooks or module._forward_pre_hooks:
                raise UnsupportedOperator("the module has forward hooks, which bounds cannot see; remove them")
            kind = type_before_parametrizations(module)
            if kind in BATCH_NORMS:
                mean, var = (self.statistics or {}).get(module, (module.running_mean, module.running_var))
                return batch_norm(module, mean, var)
            if kind in TWINS:
                function, rest = TWINS[kind](module)
                return FUNCTIONS[function](Call(function, (*args, *rest), kwargs, value))
            if kind is nn.MultiheadAttention and kind not in MODULES:
                return multihead_attention(module, args, kwargs)
            if kind in MODULES:
                return self._tried(n, kind, MODULES[kind](module), module)
            raise UnsupportedOperator(remedy(kind.__name__))
        called: Any = getattr(Tensor, str(n.target)) if n.op == "call_method" else n.target
        rule = FUNCTIONS.get(called) or FUNCTIONS.get(getattr(called, "overloadpacket", None))
        if rule is None:
            raise UnsupportedOperator(remedy(name_of(called)))
        call = Call(called, args, kwargs, value)
        return self._tried(n, called, rule(call), call)

    def _maker(self, n: fx.Node, operator: Operator, alone: bool) -> Maker | None:
        """How an operator of a call is made in a later step; it may be one of several."""
        if n.op == "call_module":
            module = self.fetch_attr(str(n.target))
            kind = type_before_parametrizations(module)
            own = (module.running_mean, module.running_var) if kind in BATCH_NORMS else ()
            if own:
                return lambda statistics: batch_norm(module, *statistics.get(module, own))
            if kind not in TWINS:
                return (lambda statistics: cast(Operator, MODULES[kind](module))) if alone else None
            fixed = not module.state_dict()
        else:
            read = [leaf for leaf in _pytree.tree_leaves((n.args, n.kwargs)) if isinstance(leaf, fx.Node)]
            others = _pytree.tree_leaves([self.env[leaf] for leaf in read if leaf not in self.value_of])
            fixed = not any(isinstance(value, Tensor) for value in others)
        return partial(_unchanged, operator) if fixed else None

    def _tried(self, n: fx.Node, kind: Any, operator: Lowered, function: Callable[[Tensor], Any]) -> Lowered:
        """The operator, which is tried if its rule is a user's and it has one input; in training it is not."""
        sources = [source for source in n.all_input_nodes if source in self.value_of]
        if isinstance(operator, Several) or len(sources) != 1 or self.statistics is not None:
            return operator
        if kind in REGISTERED:
            registered = f"the rule registered for {name_of(kind)}"
            try:
                try_once(operator, function, self.env[sources[0]])
            except UnsupportedOperator as fault:
                raise UnsupportedOperator(f"{registered} does not hold: {fault}") from None
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as fault:
                raise UnsupportedOperator(f"{registered} cannot be tried on other inputs: {fault}") from fault
        return operator

    def _output(self, n: fx.Node) -> Any:
        result = n.args[0]
        result = result[0] if isinstance(result, tuple | list) and len(result) == 1 else result
        if isinstance(result, fx.Node) and isinstance(number := self.value_of.get(result), int) and number:
            self.last = number
            return self.env[result]
        raise UnsupportedOperator("the module does not end in one tensor of logits computed from its input")


def _unchanged(operator: Operator, statistics: Statistics) -> Operator:
    return operator


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
