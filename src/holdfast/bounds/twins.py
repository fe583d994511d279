"""Modules that do what a function with a rule does, with settings of theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import nn


def _pad(mode: str) -> Callable[[Any], tuple[Any, tuple[Any, ...]]]:
    return lambda module: (F.pad, (list(module.padding), mode))


def _pool(function: Any) -> Callable[[Any], tuple[Any, tuple[Any, ...]]]:
    return lambda module: (function, (module.output_size, module.return_indices))


TWINS: dict[type[nn.Module], Callable[[Any], tuple[Any, tuple[Any, ...]]]] = {
    nn.AdaptiveMaxPool1d: _pool(F.adaptive_max_pool1d),
    nn.AdaptiveMaxPool2d: _pool(F.adaptive_max_pool2d),
    **dict.fromkeys(
        [nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d],
        lambda module: (F.pad, (list(module.padding), "constant", module.value)),
    ),
    **dict.fromkeys([nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d], _pad("constant")),
    **dict.fromkeys([nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d], _pad("reflect")),
    **dict.fromkeys([nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d], _pad("replicate")),
    **dict.fromkeys([nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d], _pad("circular")),
    nn.Unfold: lambda m: (F.unfold, (m.kernel_size, m.dilation, m.padding, m.stride)),
    nn.ChannelShuffle: lambda module: (F.channel_shuffle, (module.groups,)),
}
"""The function and what it is given beside the activation, by the module's exact type."""
