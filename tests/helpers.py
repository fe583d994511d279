"""Networks with known answers, random images, and the trace that nobody may leave on a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TINY = (
    "data.train_size=120",
    "model={name: mlp, hidden: [16]}",
    "training={epochs: 2, batch_size: 40}",
    "evaluation.examples=60",
    "evaluation.attacks=[{name: pgd, steps: 5}]",
    "evaluation.curve_points=2",
)
"""Overrides that make a run of the digits take a second."""


def linear_model(classes: int = 3, shape: tuple[int, ...] = (1, 2, 3), seed: int = 0) -> nn.Sequential:
    """A linear classifier, whose robust radius is known: margin over the dual norm of the weight difference."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(int(np.prod(shape)), classes)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator))
        linear.bias.copy_(torch.randn(linear.bias.shape, generator=generator))
    return nn.Sequential(nn.Flatten(), linear)


def linear_radius(model: nn.Module, x: Tensor, y: Tensor, norm: str) -> Tensor:
    """min_j (z_y − z_j) / ‖w_y − w_j‖_dual: the exact radius where no box is in the way; (N,)."""
    order = {"linf": 1, "l2": 2, "l1": torch.inf}[norm]
    weight, logits = model[-1].weight, model(x)
    margins = logits.gather(1, y[:, None]) - logits
    lengths = (weight[y][:, None] - weight).norm(order, dim=2)
    radii = margins / lengths
    radii[torch.arange(len(y)), y] = torch.inf
    return radii.amin(1).detach()


def small_cnn(classes: int = 4, channels: int = 1, seed: int = 0, batch_norm: bool = True) -> nn.Sequential:
    """A convolutional network with everything that a mode can change: BatchNorm and Dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(channels, 6, 3, padding=1),
            nn.BatchNorm2d(6) if batch_norm else nn.Identity(),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(6 * 16, classes),
        )


class Standardised(nn.Module):
    """A network behind (x − ½) / ¼, by a new tensor or in the tensor that it is given."""

    def __init__(self, network: nn.Module, *, in_place: bool) -> None:
        super().__init__()
        self.network, self.in_place = network, in_place

    def forward(self, x: Tensor) -> Tensor:
        if not self.in_place:
            return self.network((x - 0.5) / 0.25)
        x -= 0.5
        x /= 0.25
        return self.network(x)


IN_PLACE = ("standardises", "begins with a ReLU")


def twins(name: str) -> tuple[nn.Module, nn.Module]:
    """A model that works in place on its input, and one that computes the same and does not."""
    if name == "standardises":
        return Standardised(small_cnn(), in_place=True), Standardised(small_cnn(), in_place=False)
    return nn.Sequential(nn.ReLU(inplace=True), small_cnn()), nn.Sequential(nn.ReLU(), small_cnn())


def digits_model(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A factory of the kind that users name on the command line."""
    return linear_model(num_classes, input_shape)


def images(count: int = 12, channels: int = 1, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random images in [0, 1] of 8 × 8 and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, channels, 8, 8, generator=generator)
    return x, torch.randint(0, classes, (count,), generator=generator)


class Trace:
    """What must not change when somebody's model is used: modes, gradients, buffers, random state."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.before = model, self._state(model)

    @staticmethod
    def _state(model: nn.Module) -> list[object]:
        return [
            [module.training for module in model.modules()],
            [parameter.requires_grad for parameter in model.parameters()],
            [None if p.grad is None else p.grad.clone().tolist() for p in model.parameters()],
            [tensor.tolist() for tensor in model.state_dict().values()],
            torch.get_rng_state().tolist(),
            [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        ]

    def check(self) -> None:
        names = ("modes", "requires_grad", "gradients", "weights and buffers", "random state", "hooks")
        for name, before, after in zip(names, self.before, self._state(self.model), strict=True):
            assert before == after, f"the model's {name} changed"


def write_run(folder: Path, name: str, standard: float | None = 0.9, **recipe: object) -> Path:
    """A run's folder as far as the store reads it."""
    path = folder / name
    path.mkdir(parents=True)
    settings = {
        "data": {"name": "digits", "train_size": 100},
        "objective": {"name": "trades", "beta": 6.0},
        "threat": {"norm": "linf", "eps": 8 / 255},
        "evaluation": {"attacks": [{"name": "pgd", "steps": 5}], "radii": []},
        "seed": 0,
    }
    (path / "experiment.yaml").write_text(yaml.safe_dump(settings | recipe))
    if standard is not None:
        result = {
            "standard": standard,
            "bracket": {"attacked": standard / 2, "certified": None},
            "counts": {},
            "attacked": {"pgd": standard / 2},
            "train": {"standard": 1.0, "bracket": {"attacked": 0.8}},
        }
        (path / "result.json").write_text(json.dumps(result))
    return path


class Largest(TorchDispatchMode):
    """How many entries the largest tensor has that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        sizes = [
            leaf.untyped_storage().nbytes() // leaf.itemsize for leaf in tree_leaves(made) if torch.is_tensor(leaf)
        ]
        self.entries = max(self.entries, *sizes, 0)
        return made


class Shelf:
    """A store in memory that stops after so many pieces, as a power cut would."""

    def __init__(self, most: int) -> None:
        self.most, self.pieces, self.given = most, [], 0

    def kept(self, stage: str) -> list[tuple[Tensor, Any]]:
        found = [(rows, result) for name, rows, result in self.pieces if name == stage]
        self.given += len(found)
        return found

    def put(self, stage: str, rows: Tensor, found: Any) -> None:
        if len(self.pieces) == self.most:
            raise KeyboardInterrupt
        self.pieces.append((stage, rows, found))
