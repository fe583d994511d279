"""What the steps of one training share of the network that they change: its trace, and saved singular vectors.

A step reads the weights as they are. What a trace finds besides, which operator follows which, does not change from
step to step; and an operator norm is found again fastest from where it was found last.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from holdfast.bounds.graph import Maker, Statistics, refuse_what_tracing_skips, trace, traced
from holdfast.bounds.operators import Graph, Node
from holdfast.inference import eval_mode

_KNOWN = "torch.nn.", "holdfast.layers.", "holdfast.models."
"""Where the classes come from whose forwards hang on weights and plain attributes alone."""
_OF_EVERY_MODULE = vars(nn.Module()).keys()
_PASSED_OVER = Tensor, list, dict
"""Of those classes what is derived: kept weights, padding as lists."""
_carried: Carried | None = None


class _Kept(NamedTuple):
    graph: Graph
    makers: list[Maker]
    """Of its operators."""
    modules: list[tuple[nn.Module, tuple[object, ...]]]
    """The network's when it was traced, and what they were but for their weights' values."""


class Carried:
    """One for each training; inside ``carrying`` the objectives find it."""

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], _Kept] = {}
        self.vectors: dict[str, Tensor] = {}
        """The last left singular vector at each place, (1, ...)."""

    def state(self) -> dict[str, Tensor]:
        """What decides later steps, for a checkpoint."""
        return dict(self.vectors)

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a ``state``."""
        self.vectors = dict(state)

    def trace(self, model: nn.Module, x: Tensor, statistics: Statistics) -> Graph:
        """The graph of the weights of the moment: traced anew where anything but weights has changed, where the
        forward computes with them itself, and at every step where it is anybody's own: it may read numbers off
        buffers, lists or globals, which no comparison sees."""
        model = getattr(model, "_orig_mod", model)
        key = id(model), tuple(x.shape[1:]), x.dtype, x.device
        kept = self._kept.get(key)
        if kept is None or not _same(model, kept.modules):
            graph, makers = traced(model, x, statistics)
            if all(makers) and all(map(_known, model.modules())):
                modules = [(module, _state(module)) for module in model.modules()]
                self._kept[key] = _Kept(graph, [maker for maker in makers if maker], modules)
            return graph
        refuse_what_tracing_skips(model)
        with eval_mode(model):
            nodes = [
                Node(maker(statistics), node.inputs, node.path, node.shape)
                for node, maker in zip(kept.graph.nodes, kept.makers, strict=True)
            ]
        graph = replace(kept.graph, nodes=nodes)
        graph.structure.update(kept.graph.structure)
        return graph


@contextlib.contextmanager
def carrying(carried: Carried) -> Iterator[None]:
    """The steps inside belong to one training."""
    global _carried
    before, _carried = _carried, carried
    try:
        yield
    finally:
        _carried = before


def trace_step(model: nn.Module, x: Tensor, statistics: Statistics) -> Graph:
    """The graph of a model within a step of its training, or by itself."""
    return trace(model, x, statistics) if _carried is None else _carried.trace(model, x, statistics)


def saved_vectors() -> dict[str, Tensor] | None:
    """Those of the training under way; None outside of one."""
    return None if _carried is None else _carried.vectors


def _known(module: nn.Module) -> bool:
    """Whether its forward is torch's or ours."""
    return type_before_parametrizations(module).__module__.startswith(_KNOWN)


def _state(module: nn.Module) -> tuple[object, ...]:
    """What the forward of a known module hangs on beside the values of tensors: settings and functions, the
    submodules in their order, which tensors there are, of what size, and hooks."""
    plain = {k: v for k, v in vars(module).items() if not (k in _OF_EVERY_MODULE or isinstance(v, _PASSED_OVER))}
    sizes = {k: None if v is None else v.shape for k, v in {**module._parameters, **module._buffers}.items()}
    hooks = list(module._forward_pre_hooks.values()), list(module._forward_hooks.values())
    return type(module), plain, list(module._modules.items()), sizes, hooks


def _same(model: nn.Module, modules: list[tuple[nn.Module, tuple[object, ...]]]) -> bool:
    now = list(model.modules())
    return len(now) == len(modules) and all(
        module is before and _state(module) == state for module, (before, state) in zip(now, modules, strict=True)
    )
