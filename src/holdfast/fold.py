"""A copy of a model for whoever asks it many questions: the same function, cheaper to differentiate."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from holdfast.inference import copied_inputs, frozen_eval, logits_of

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
PAIRS = {
    (nn.Linear, nn.BatchNorm1d),
    (nn.Conv1d, nn.BatchNorm1d),
    (nn.Conv2d, nn.BatchNorm2d),
    (nn.Conv3d, nn.BatchNorm3d),
}
"""Layers and the BatchNorm behind them that fold into one."""
FEWEST = 2
"""Passes from which on a copy without BatchNorm is worth its checks: of images a seventh of a pass is gained."""
FEWEST_PLAIN = 8
"""The same where the channels' order is all that changes: a thirtieth."""
PLANS = 8
"""Modules whose plan is remembered."""
INNER = set(vars(nn.Module()))
"""Attributes of every module: looked at by themselves, or of no effect in eval mode."""


class InBfloat16(nn.Module):
    """A model whose products are taken in bfloat16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            logits: Tensor = self.model(x)
        return logits.to(x.dtype)


class ChannelsLast(nn.Module):
    """A model of images that keeps the channels of a pixel together: faster convolutions on a CPU."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1:  # both orders are one, and only the strides can say which is meant
            x = x.reshape(len(x), *x.shape[2:], 1).permute(0, 3, 1, 2)
        logits: Tensor = self.model(x.contiguous(memory_format=torch.channels_last))
        return logits


class _Folded(nn.Module):
    """A layer with the BatchNorm behind it, by their weights as they were when it was last refreshed."""

    weight: Tensor
    bias: Tensor

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.pair: tuple[Any, Any] = (layer, norm)  # in a tuple: their parameters are not its own

    def refresh(self) -> None:
        """Fold anew: w γ / √(σ² + ε), (b − μ) γ / √(σ² + ε) + β."""
        layer, norm = self.pair
        scale = torch.rsqrt(norm.running_var + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = -norm.running_mean * scale if norm.bias is None else norm.bias - norm.running_mean * scale
        self.weight = layer.weight * scale.view(-1, *[1] * (layer.weight.dim() - 1))
        self.bias = shift if layer.bias is None else shift + layer.bias * scale

    def forward(self, x: Tensor) -> Tensor:
        layer = self.pair[0]
        if isinstance(layer, nn.Linear):
            return F.linear(x, self.weight, self.bias)
        answer: Tensor = layer._conv_forward(x, self.weight, self.bias)
        return answer


@dataclass(frozen=True)
class _Plan:
    """How a module folds: a graph over its own submodules, whose weights are therefore always its own."""

    state: list[object]
    """What the trace saw of the module, and what it kept of it."""
    graph: fx.GraphModule | None
    """None where nothing folds, or the module cannot be traced."""

    def holds(self, model: nn.Module) -> bool:
        """Whether the module is still the one that was traced."""
        now = _state(model)
        return len(now) == len(self.state) and all(
            a is b or (type(a) is type(b) and isinstance(a, bool | int | float | str) and a == b)
            for a, b in zip(now, self.state, strict=True)
        )


_plans: WeakKeyDictionary[nn.Module, _Plan] = WeakKeyDictionary()


def _state(model: nn.Module) -> list[object]:
    """All that a trace may take from a module besides the values of its weights, one behind the other.

    The submodules by place, their forwards, hooks and attributes; of modules that a trace goes through also the
    number of changes of every tensor beside the parameters, as what follows from one is a constant of the graph.
    """
    state: list[object] = []
    for name, module in model.named_modules(remove_duplicate=False):
        buffers = list(module.buffers(recurse=False))
        own = [value for key, value in vars(module).items() if key not in INNER]
        state += [name, inspect.getattr_static(type(module), "forward", None), *own]
        state += [*module.parameters(recurse=False), *buffers]
        if module is not model:  # which its plan shall not keep alive; its own hooks are no part of a trace
            state += [module, *module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if not type(module).__module__.startswith("torch.nn"):
            state += [one._version for one in [*buffers, *own] if isinstance(one, Tensor)]
    return state


def _traced(model: nn.Module) -> fx.GraphModule | None:
    """The module as a graph in which every BatchNorm is folded that can be; None where there is none."""
    traced, number = fx.symbolic_trace(model), 0
    for node in list(traced.graph.nodes):
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        layer, norm = traced.get_submodule(str(before.target)), traced.get_submodule(node.target)
        if (type(layer), type(norm)) not in PAIRS or not isinstance(norm, BATCH_NORMS) or _hooked(layer, norm):
            continue
        if norm.running_var is None:
            continue
        traced.add_submodule(f"folded_{number}", _Folded(layer, norm))
        before.target, number = f"folded_{number}", number + 1
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
    if not number:
        return None
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def _hooked(*modules: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def _plan(model: nn.Module) -> _Plan:
    """That of a module, from memory if it has not changed."""
    plan = _plans.get(model)
    if plan is None or not plan.holds(model):
        try:
            graph = _traced(model)
        except Exception:  # whatever a foreign forward does to symbolic values; the module itself is right
            graph = None
        while len(_plans) >= PLANS:
            _plans.pop(next(iter(_plans)))
        plan = _plans[model] = _Plan(_state(model), graph)
    for module in plan.graph.modules() if plan.graph is not None else ():
        if isinstance(module, _Folded):
            module.refresh()
    return plan


@torch.no_grad()
def folded(model: nn.Module, x: Tensor, passes: float = math.inf) -> nn.Module:
    """The same function on the same weights, cheaper to differentiate, or the model itself.

    Every BatchNorm is folded into the convolution before it, and on a CPU convolutions run with channels last.
    A step is left out where the model does not allow it (torch.fx cannot trace it, it takes views of
    memory), and where the result would not give the model's own logits on these inputs. It holds as long as the
    weights are what they are; the trace is remembered as long as the model is the same module.

    Args:
        model: frozen, in eval mode.
        x: some inputs, (n, ...).
        passes: so many forward and backward passes shall be made; a step that they do not pay for is left out.
    """
    kinds = {type(module) for module in model.modules()}
    norms = bool(kinds & set(BATCH_NORMS))
    images = nn.Conv2d in kinds and x.dim() == 4 and x.device.type == "cpu"
    norms, images = norms and passes >= FEWEST, images and passes >= (FEWEST if norms else FEWEST_PLAIN)
    lent = not all(parameter.is_leaf for parameter in model.parameters())  # weights that torch.func put in place
    if not len(x) or not (norms or images) or lent:
        return model
    logits, found = logits_of(model, x), model
    graph = _plan(model).graph if norms else None
    if images:
        found = _alike(ChannelsLast(graph or model), x, logits) or found
    if found is model and graph is not None:
        found = _alike(graph, x, logits) or found
    if found is model and graph is not None and images:
        found = _alike(ChannelsLast(model), x, logits) or found
    return found


def _alike(copy: nn.Module, x: Tensor, logits: Tensor) -> nn.Module | None:
    """The copy, if it answers these inputs like this; it gets the model's own care with its inputs."""
    try:
        answer = copy(x.clone())
    except Exception:  # whatever a foreign forward does to strides; the model itself is right
        return None
    if answer.shape != logits.shape or not torch.allclose(answer, logits, rtol=1e-3, atol=1e-4):
        return None
    if copied_inputs not in copy._forward_pre_hooks.values():  # a GraphModule does not take it over
        copy.register_forward_pre_hook(copied_inputs)
    return copy


@contextlib.contextmanager
def frozen_copy(model: nn.Module, x: Tensor, passes: int) -> Iterator[nn.Module]:
    """What a search of so many passes asks: the model in eval mode with frozen parameters, ``folded``."""
    with frozen_eval(model):
        yield folded(model, x[:2], passes)
