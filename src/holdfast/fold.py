"""A copy of a model for whoever asks it many questions: the same function, cheaper to differentiate."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from holdfast.inference import copied_inputs, frozen_eval, logits_of

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: nn.BatchNorm1d,
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
}
"""Layers, and the BatchNorm behind them that folds into them."""
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
        logits: Tensor = self.model(x.contiguous(memory_format=torch.channels_last))
        return logits


class _Folded(nn.Module):
    """A layer with the BatchNorm behind it, if there is one, by their weights as they were when last refreshed."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Module, norm: nn.Module | None) -> None:
        super().__init__()
        self.pair: tuple[Any, Any] = (layer, norm)  # in a tuple: their parameters are not its own

    def refresh(self, *, channels_last: bool) -> None:
        """Fold anew: w γ / √(σ² + ε), (b − μ) γ / √(σ² + ε) + β."""
        layer, norm = self.pair
        weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
        if norm is not None:
            scale = torch.rsqrt(norm.running_var + norm.eps)
            if norm.weight is not None:
                scale = scale * norm.weight
            shift = -norm.running_mean * scale if norm.bias is None else norm.bias - norm.running_mean * scale
            weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
            bias = shift if bias is None else shift + bias * scale
        if channels_last and weight.dim() == 4:
            weight = weight.contiguous(memory_format=torch.channels_last)
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        layer = self.pair[0]
        if isinstance(layer, nn.Linear):
            return F.linear(x, self.weight, self.bias)
        answer: Tensor = layer._conv_forward(x, self.weight, self.bias)
        return answer


@dataclass(frozen=True)
class _Plan:
    """How a module folds: a graph over its own submodules, but for convolutions and what folds into them."""

    state: list[object]
    """What the trace saw of the module, and what it kept of it."""
    graph: fx.GraphModule | None
    """None where the module cannot be traced."""

    def refreshed(self, *, channels_last: bool) -> fx.GraphModule | None:
        """The graph with the weights as they are now."""
        for module in self.graph.modules() if self.graph is not None else ():
            if isinstance(module, _Folded):
                module.refresh(channels_last=channels_last)
        return self.graph

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


def _traced(model: nn.Module) -> fx.GraphModule:
    """The module as a graph in which every BatchNorm is folded that can be, and convolutions hold weights apart. A
    dense layer by itself, the head, stays what it is."""
    traced, layers = fx.symbolic_trace(model), dict[fx.Node, tuple[nn.Module, nn.Module | None]]()
    for node in [node for node in traced.graph.nodes if node.op == "call_module"]:
        module, before = traced.get_submodule(node.target), node.args[0] if node.args else None
        if type(module) in LAYERS and not _hooked(module):
            layers[node] = (module, None)
        elif isinstance(before, fx.Node) and before in layers and len(before.users) == 1:
            layer, norm = layers[before]
            if norm is None and _folds(layer, module):
                layers[before] = (layer, module)
                node.replace_all_uses_with(before)
                traced.graph.erase_node(node)
    apart = {node: pair for node, pair in layers.items() if pair[1] is not None or type(pair[0]) is not nn.Linear}
    for number, (node, pair) in enumerate(apart.items()):
        traced.add_submodule(f"folded_{number}", _Folded(*pair))
        node.target = f"folded_{number}"
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def _folds(layer: nn.Module, norm: nn.Module) -> bool:
    return type(norm) is LAYERS[type(layer)] and norm.running_var is not None and not _hooked(norm)


def _hooked(*modules: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def _plan(model: nn.Module, x: Tensor) -> _Plan:
    """That of a module, from memory if it has not changed."""
    plan = _plans.get(model)
    if plan is None or not plan.holds(model):
        state = _state(model)
        try:
            plan = _Plan(state, _traced(model))
            lost = _loses_gradient(plan, model, x[:1])
        except Exception:  # whatever a foreign forward does to symbolic values; the module itself is right
            lost = True
        plan = _Plan(state, None) if lost or plan is None else plan
        while len(_plans) >= PLANS:
            _plans.pop(next(iter(_plans)))
        _plans[model] = plan
    return plan


@torch.no_grad()
def folded(model: nn.Module, x: Tensor, passes: float = math.inf) -> nn.Module:
    """The same function on the same weights, cheaper to differentiate, or the model itself.

    Every BatchNorm is folded into the convolution before it, and on a CPU convolutions of images in colour run with
    channels last; the gradient of an image of one channel takes longer so.
    A step is left out where the model does not allow it (torch.fx cannot trace it, it takes views of memory), and
    where the result would not give the model's own logits on these inputs, or its trace another gradient. It holds
    as long as the weights are what they are; the trace is remembered as long as the model is the same module.

    Args:
        model: frozen, in eval mode.
        x: some inputs, (n, ...).
        passes: so many forward and backward passes shall be made; a step that they do not pay for is left out.
    """
    kinds = {type(module) for module in model.modules()}
    norms = bool(kinds & set(BATCH_NORMS))
    images = nn.Conv2d in kinds and x.dim() == 4 and x.shape[1] > 1 and x.device.type == "cpu"
    norms, images = norms and passes >= FEWEST, images and passes >= (FEWEST if norms else FEWEST_PLAIN)
    lent = not all(parameter.is_leaf for parameter in model.parameters())  # weights that torch.func put in place
    if not len(x) or not (norms or images) or lent:
        return model
    logits, plan, found = logits_of(model, x), _plan(model, x), None
    if images:
        found = _alike(lambda: ChannelsLast(plan.refreshed(channels_last=True) or _converted(model)), x, logits)
    if found is None and norms and plan.graph is not None:
        found = _alike(lambda: plan.refreshed(channels_last=False), x, logits)
    return model if found is None else found


def _converted(model: nn.Module) -> nn.Module:
    """A copy with the channels of every weight last, of a module that cannot be traced."""
    convert: Any = deepcopy(model).to  # its annotations do not know memory formats
    copy: nn.Module = convert(memory_format=torch.channels_last)
    return copy


def _alike(make: Callable[[], nn.Module | None], x: Tensor, logits: Tensor) -> nn.Module | None:
    """What is made, if it answers these inputs like this; it gets the model's own care with its inputs."""
    try:
        copy = make()
        answer = None if copy is None else copy(x.clone())
    except Exception:  # whatever a foreign forward does to strides; the model itself is right
        return None
    if copy is None or answer is None or answer.shape != logits.shape:
        return None
    if copied_inputs not in copy._forward_pre_hooks.values():  # a GraphModule does not take it over
        copy.register_forward_pre_hook(copied_inputs)
    return copy if torch.allclose(answer, logits, rtol=1e-3, atol=1e-4) else None


def _loses_gradient(plan: _Plan, model: nn.Module, x: Tensor) -> bool:
    """Whether the trace has another gradient than the module: without a backward that a module brings along."""
    graph = plan.refreshed(channels_last=False)
    if graph is None:
        return False
    slope, own = _slope(graph, x), _slope(model, x)
    return not (slope - own).norm() <= 0.1 * own.norm()  # rounding turns a ReLU or two; NaN is no gradient


def _slope(model: nn.Module, x: Tensor) -> Tensor:
    """The gradient of a sum of the logits in unequal parts."""
    with torch.enable_grad():
        points = x.detach().requires_grad_(True)
        logits = model(points.clone())
        values = (logits * torch.linspace(1, 2, logits.shape[1]).to(logits)).sum()
        return torch.autograd.grad(values, points, materialize_grads=True)[0]


@contextlib.contextmanager
def frozen_copy(model: nn.Module, x: Tensor, passes: int) -> Iterator[nn.Module]:
    """What a search of so many passes asks: the model in eval mode with frozen parameters, ``folded``."""
    with frozen_eval(model):
        yield folded(model, x[:2], passes)
