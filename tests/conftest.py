"""Fixtures for every test: reference arrays, small networks, and a guard on global state."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets  # noqa: F401  # these change the environment when first imported
import numpy as np
import pytest
import sklearn.datasets  # noqa: F401
import torch
from torch import Tensor, nn

import holdfast.experiments.runs.training  # noqa: F401  # fills every registry
from holdfast.component import Component

# Runs on real data: they are collected only where the data are.
collect_ignore = [] if os.environ.get("HOLDFAST_DATA") else ["test_real_data.py", "attacks/test_peers.py"]

if not os.environ.get("HOLDFAST_RAY"):  # make test-ray installs Ray and sets it
    collect_ignore.append("experiments/sweeps/test_ray.py")

OTHERS = ("PYTEST", "PYTORCH", "TORCH", "_TORCH", "TRITON")  # variables that these set for themselves
REFERENCE = Path(__file__).parent / "reference"
torch.set_num_threads(1)


def _families() -> list[type[Component]]:
    return [cls for cls in Component.__subclasses__() if "registry" in cls.__dict__]


def _global_state() -> dict[str, object]:
    return {
        "torch generator": torch.get_rng_state().numpy().tobytes(),
        "numpy generator": str(np.random.get_state()),  # noqa: NPY002
        "python generator": random.getstate(),
        "default dtype": torch.get_default_dtype(),
        "gradient mode": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "folder": os.getcwd(),
        "environment": {k: v for k, v in os.environ.items() if not k.startswith(OTHERS)},
        "registries": {family.family: sorted(family.registry) for family in _families()},
    }


@pytest.fixture(autouse=True)
def unchanged_world() -> Iterator[None]:
    """Fails any test that leaves global state changed."""
    torch.manual_seed(0)
    before = _global_state()
    yield
    after = _global_state()
    changed = [name for name in before if before[name] != after[name]]
    # A test may draw from torch's generator itself; what it calls may not, and says so by its own tests.
    assert not set(changed) - {"torch generator"}, f"the test changed {changed}"


@pytest.fixture
def reference() -> Callable[[str], dict[str, Tensor]]:
    """Reads tests/reference/NAME.npz as tensors."""

    def read(name: str) -> dict[str, Tensor]:
        with np.load(REFERENCE / f"{name}.npz") as arrays:
            return {
                key: torch.from_numpy(np.array(arrays[key]))
                for key in arrays.files
                if arrays[key].dtype.kind in "biuf"
            }

    return read


@pytest.fixture
def certified_nets(reference: Callable[[str], dict[str, Tensor]]) -> dict[str, tuple[nn.Module, dict[str, Tensor]]]:
    """The two reference networks of the certified line in float64, with their arrays."""
    nets = {
        "mlp_tiny": nn.Sequential(
            nn.Flatten(), nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 10)
        ),
        "cnn2_tiny": nn.Sequential(
            nn.Conv2d(1, 4, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(4, 8, 4, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32, 16),
            nn.ReLU(),
            nn.Linear(16, 10),
        ),
    }
    result = {}
    for name, net in nets.items():
        arrays = reference(f"certified_{name}")
        net.load_state_dict({k.removeprefix("param__"): v for k, v in arrays.items() if k.startswith("param__")})
        result[name] = (net.double(), arrays)
    return result
