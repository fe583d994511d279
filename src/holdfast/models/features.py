"""The penultimate features of any module: the input of the last linear layer that its forward calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Features:
    """What the last linear layer of a forward pass read and wrote."""

    features: Tensor
    """(N, d)."""
    logits: Tensor
    """What the module answered, (N, K)."""
    head: nn.Linear
    """The layer itself."""


def features(model: nn.Module) -> Callable[[Tensor], Features]:
    """A function from inputs to the penultimate features, with gradient and in the module's own mode.

    >>> features(model)(x).features    # doctest: +SKIP

    The function raises:
        ValueError: the forward calls no linear layer, or its input is not one vector per example.
    """

    def extract(x: Tensor) -> Features:
        seen: list[tuple[nn.Linear, Tensor]] = []

        def record(module: nn.Linear, args: tuple[Tensor, ...]) -> None:
            seen.append((module, args[0]))

        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        hooks = [module.register_forward_pre_hook(record) for module in linear]
        try:
            logits = model(x)
        finally:
            for hook in hooks:
                hook.remove()
        if not seen:
            raise ValueError(f"{type(model).__name__} calls no linear layer, so it has no penultimate features")
        head, inputs = seen[-1]
        if inputs.dim() != 2 or len(inputs) != len(x):
            raise ValueError(f"the last linear layer reads {tuple(inputs.shape)}, not one vector per example")
        return Features(inputs, logits, head)

    return extract
