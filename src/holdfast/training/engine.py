"""The one module that knows lightning-fabric: device, placement, backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from holdfast.component import Settings

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Engine(Settings):
    """Where training and evaluation run."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """``auto`` takes a GPU where there is one."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Of the training steps; validation and evaluation are always in float32."""

    def start(self) -> RunningEngine:
        """The engine, ready to place modules and tensors.

        Raises:
            ValueError: the accelerator asked for is not there.
        """
        from lightning_fabric import Fabric  # takes two seconds to import

        try:
            return RunningEngine(Fabric(accelerator=self.accelerator, devices=1, precision=self.precision))
        except RuntimeError as fault:
            raise ValueError(f"engine.accelerator={self.accelerator}: {fault}") from fault


class RunningEngine:
    """Places modules and steps optimisers on the devices it was started for."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric

    @property
    def device(self) -> torch.device:
        return self._fabric.device

    def prepare(self, step: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The module whose forward is one training step, and its optimiser, on the device."""
        module, prepared = self._fabric.setup(step, optimizer)
        return module, prepared

    def backward(self, loss: Tensor) -> None:
        self._fabric.backward(loss)
