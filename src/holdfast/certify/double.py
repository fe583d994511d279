"""A network in float64, for what float32 cannot decide."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from holdfast.inference import eval_mode, predict
from holdfast.layers.lipschitz import in_double


def in_float64(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """The model in float64, and an empty tensor of the type and device that its inputs go to: the CPU, where theirs
    may have no float64.

    Raises:
        ValueError: the model cannot be copied.
    """
    if x.dtype == torch.float64:
        return model, x.new_empty(0)
    with eval_mode(model):
        predict(model, x[:1])  # so that what layers derive from their parameters is derived in their precision
    try:
        double = in_double(model)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as fault:  # of deepcopy, about tensors that are no leaves
        raise ValueError(f"{type(model).__name__} cannot be copied to float64: {fault}") from fault
    for module in double.modules():
        if isinstance(module, nn.RMSNorm) and module.eps is None:
            module.eps = torch.finfo(x.dtype).eps  # None is that of the inputs' precision
    device = x.device if x.device.type in ("cpu", "cuda") else torch.device("cpu")
    return double.to(device), torch.empty(0, dtype=torch.float64, device=device)
