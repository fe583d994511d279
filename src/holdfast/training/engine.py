"""The one module that knows lightning-fabric: devices, processes, placement, precision, backward."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from holdfast.component import Settings

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.wrappers import _FabricModule

T = TypeVar("T")
PATIENCE = datetime.timedelta(days=365)
"""How long processes wait for one another: the others wait while the first validates and evaluates."""


class Engine(Settings):
    """Where training and evaluation run."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """``auto`` takes a GPU where there is one."""
    devices: PositiveInt = 1
    """Train on so many devices of each node, one process each; a batch is divided among all of them."""
    nodes: PositiveInt = 1
    """Machines; torchrun or Slurm starts the command there, or you do, with MASTER_ADDR and NODE_RANK set."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Of the training steps; validation and evaluation are always in float32."""
    compile: bool = False
    """Compile the model's forward for the training steps; the first ones take longer."""

    @property
    def leads(self) -> bool:
        """Whether this process is the one that validates, writes and speaks for all."""
        return process_number(self.devices) == 0

    def start(self, *, alone: bool = False) -> RunningEngine:
        """The engine, ready to place modules and tensors.

        Args:
            alone: on one device, for work that is not divided.

        Raises:
            ValueError: the accelerator or the number of devices asked for is not there.
        """
        from lightning_fabric import Fabric  # takes two seconds to import
        from lightning_fabric.strategies import DDPStrategy

        together = int(os.environ.get("WORLD_SIZE", 0))
        if not alone and together and together != self.devices * self.nodes:
            raise ValueError(
                f"{together} processes were started together, but engine.devices={self.devices} and "
                f"engine.nodes={self.nodes} make {self.devices * self.nodes}: they would all do the same"
            )
        if self.precision == "16-mixed" and not torch.cuda.is_available():
            raise ValueError("engine.precision=16-mixed needs a GPU; bf16-mixed runs on CPUs, too")
        devices, nodes = (1, 1) if alone else (self.devices, self.nodes)
        several = devices * nodes > 1
        if several and not hasattr(sys.modules["__main__"], "__file__"):
            raise ValueError("several processes start a program again: it must be the holdfast command or a script")
        # An objective need not use every parameter at every step.
        strategy = DDPStrategy(timeout=PATIENCE, find_unused_parameters=True) if several else "auto"
        try:
            fabric = Fabric(
                accelerator=self.accelerator,
                strategy=strategy,
                devices=devices,
                num_nodes=nodes,
                precision=self.precision,
            )
        except (RuntimeError, ValueError) as fault:
            asked = f"engine.accelerator={self.accelerator} with devices={devices}, nodes={nodes}"
            raise ValueError(f"{asked}: {fault}") from fault
        return RunningEngine(fabric, leads=alone or self.leads, compiles=self.compile)


def process_number(devices: int) -> int:
    """Which of the processes of a training this is, as torchrun, Slurm or our own launch numbered it; else 0."""
    for name in ("RANK", "SLURM_PROCID"):
        if name in os.environ:
            return int(os.environ[name])
    return int(os.environ.get("NODE_RANK", 0)) * devices + int(os.environ.get("LOCAL_RANK", 0))


class RunningEngine:
    """Places modules and steps optimisers on the devices it was started for."""

    def __init__(self, fabric: Fabric, *, leads: bool = True, compiles: bool = False) -> None:
        self._fabric, self._compiles = fabric, compiles
        self.leads = leads
        """Whether this process validates, writes and speaks for all."""
        self._several = fabric.world_size > 1
        if fabric.device.type == "cuda":  # or cuBLAS adds in an order of its own
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    def launch(self) -> None:
        """Start the other processes: each runs this program from its beginning and meets us here."""
        if self._several:
            self._fabric.launch()
            atexit.register(_leave_group)

    @property
    def device(self) -> torch.device:
        return self._fabric.device

    def seed(self, seed: int) -> None:
        """Seed the global generators of the CPU and of this device; ``torch.manual_seed`` takes a millisecond."""
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    @property
    def processes(self) -> int:
        return self._fabric.world_size

    def share(self, count: int) -> range:
        """Which examples of a batch of so many are this process's; neighbouring, sizes differ by one at most."""
        number, processes = self._fabric.global_rank, self.processes
        return range(count * number // processes, count * (number + 1) // processes)

    def prepare(self, step: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The module whose forward is one training step, and its optimiser, on the device.

        Its ``model`` is compiled where that was asked for; parameters are shared with the one given.
        """
        module, prepared = self._fabric.setup(step, optimizer)
        if self._compiles:
            step.model = cast(nn.Module, torch.compile(cast(nn.Module, step.model)))
        return module, prepared

    def backward(self, loss: Tensor) -> None:
        self._fabric.backward(loss)

    @contextlib.contextmanager
    def accumulating(self, step: nn.Module) -> Iterator[None]:
        """Backward passes that leave the gradients where they are until one outside of this adds them up."""
        with self._fabric.no_backward_sync(cast("_FabricModule", step), enabled=self._several):
            yield

    def state(self) -> dict[str, Any]:
        """What mixed precision remembers between steps."""
        return self._fabric.strategy.precision.state_dict()

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a ``state``."""
        self._fabric.strategy.precision.load_state_dict(state)

    def clip(self, step: nn.Module, optimizer: torch.optim.Optimizer, norm: float) -> None:
        """Scale the gradient down to this l_2 norm where it is longer."""
        self._fabric.clip_gradients(step, optimizer, max_norm=norm, error_if_nonfinite=False)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        return cast(Tensor, self._fabric.all_reduce(value.clone(), reduce_op="sum")) if self._several else value

    def all(self, flag: Tensor) -> bool:
        """Whether the flag is set in every process."""
        return bool(self.sum(flag.double()) == self.processes)

    def of_first(self, value: T) -> T:
        """The first process's value."""
        return self._fabric.broadcast(value) if self._several else value

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, in every one of them."""
        values: list[Any] = [value] * self.processes
        if self._several:
            torch.distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        if self._several:
            self._fabric.barrier()


def _leave_group() -> None:
    """End the group's threads before the interpreter ends, which aborts where one still runs."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
