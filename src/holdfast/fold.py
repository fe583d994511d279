"""A copy of a model for whoever asks it many questions: the same function, cheaper to differentiate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

from holdfast.inference import copied_inputs, frozen_eval, logits_of

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


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
        convert: Any = model.to  # its annotations do not know memory formats
        self.model: nn.Module = convert(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x.contiguous(memory_format=torch.channels_last))
        return logits


@torch.no_grad()
def folded(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy that is cheaper to differentiate, or the model itself.

    Every BatchNorm is folded into the convolution before it, and on a CPU convolutions run with channels last.
    A step is left out where the model does not allow it (torch.fx cannot trace it, it takes views of
    memory), and where the copy would not give the model's own logits on these inputs, or not its gradient.

    Args:
        model: frozen, in eval mode.
        x: some inputs, (n, ...).
    """
    kinds = {type(module) for module in model.modules()}
    norms = bool(kinds & set(BATCH_NORMS))
    images = nn.Conv2d in kinds and x.dim() == 4 and x.device.type == "cpu"
    lent = not all(parameter.is_leaf for parameter in model.parameters())  # weights that torch.func put in place
    if not len(x) or not (norms or images) or lent:
        return model
    logits, copy = logits_of(model, x), model
    if norms:
        copy = _alike(lambda: _fused(model, x), x, logits) or model
    if images:
        copy = _alike(lambda: ChannelsLast(deepcopy(copy)), x, logits) or copy
    if copy is not model:  # the model has its own from frozen_eval, which a GraphModule does not take over
        copy.register_forward_pre_hook(copied_inputs)
    return copy.requires_grad_(False)


def _alike(make: Callable[[], nn.Module], x: Tensor, logits: Tensor) -> nn.Module | None:
    """What is made, if it answers these inputs like this."""
    try:
        copy = make()
        answer = copy(x.clone())
    except Exception:  # whatever a foreign forward does to symbolic values or strides; the model itself is right
        return None
    same = answer.shape == logits.shape and torch.allclose(answer, logits, rtol=1e-3, atol=1e-4)
    return copy if same else None


def _fused(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy with every BatchNorm in the convolution before it, or the model itself where the trace loses its
    gradient: a backward that a module brings along."""
    copy = fuse(fx.symbolic_trace(model), inplace=False, no_trace=True)
    slope, own = _slope(copy, x[:1]), _slope(model, x[:1])
    # Rounding turns a ReLU or two, which moves a gradient a little.
    return copy if (slope - own).norm() <= 0.1 * own.norm() else model


def _slope(model: nn.Module, x: Tensor) -> Tensor:
    """The gradient of a sum of the logits in unequal parts."""
    with torch.enable_grad():
        points = x.detach().requires_grad_(True)
        logits = model(points.clone())
        values = (logits * torch.linspace(1, 2, logits.shape[1]).to(logits)).sum()
        return torch.autograd.grad(values, points, materialize_grads=True)[0]


@contextlib.contextmanager
def frozen_copy(model: nn.Module, x: Tensor) -> Iterator[nn.Module]:
    """What a search asks: the model in eval mode with frozen parameters (``frozen_eval``), ``folded``."""
    with frozen_eval(model):
        yield folded(model, x[:2])
