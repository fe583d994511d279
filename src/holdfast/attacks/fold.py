"""The attack's own copy of a model: the same function, cheaper to differentiate."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class InBfloat16(nn.Module):
    """A model whose products are taken in bfloat16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            logits: Tensor = self.model(x)
        return logits.to(x.dtype)


@torch.no_grad()
def folded(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy with every BatchNorm folded into the convolution before it, or the model itself.

    It is the model itself where there is no BatchNorm, where torch.fx cannot trace it, or where the copy
    does not give the model's own logits on these inputs.

    Args:
        model: frozen, in eval mode.
        x: some inputs, (n, ...).
    """
    if not any(isinstance(module, NORMS) for module in model.modules()) or not len(x):
        return model
    try:
        copy: nn.Module = fuse(fx.symbolic_trace(model), inplace=False, no_trace=True)
        answer = copy(x.clone())
    except Exception:  # whatever a foreign forward does to symbolic values; the model itself is always right
        return model
    logits = model(x.clone())
    same = answer.shape == logits.shape and torch.allclose(answer, logits, rtol=1e-3, atol=1e-4)
    return copy.requires_grad_(False) if same else model
