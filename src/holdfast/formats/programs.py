"""Networks as torch writes them to a file with their code: programs of torch.export, and TorchScript."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from holdfast.doors import fixed_batch
from holdfast.layers import InPieces
from holdfast.models import Model
from holdfast.models.model import Shape

_HARMLESS = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/.*|extra/.*|models/[^/]*\.json|"
    r"data/(weights|constants|sample_inputs)/[^/]*\.json|data/weights/weight_\d+|data/constants/tensor_\d+|"
    r"data/sample_inputs/[^/]*\.pt"
)
"""What an archive of torch.export holds beside code that would run: shared objects, pickled objects of Python."""


class Program(nn.Module):
    """What was read from a file, in the one mode in which it was saved."""

    def __init__(self, network: nn.Module, path: Path) -> None:
        super().__init__()
        self.network = network
        self.training = False
        if not network.state_dict():  # frozen: it is known by the file
            digest = hashlib.blake2b(path.read_bytes(), digest_size=12).digest()
            self.register_buffer("digest", torch.frombuffer(bytearray(digest), dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.network(x)
        return found

    def train(self, mode: bool = True) -> Self:
        """A program of torch.export has no other mode, and raises when it is asked for one."""
        return self


def read_exported(path: Path | str) -> nn.Module:
    """The network of a ``.pt2`` file of ``torch.export.save``, for batches of any size; nothing in it is unpickled
    but tensors.

    One exported for batches of one size is asked in pieces of that size.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, holds more than a graph and tensors, or was written by a torch that this one
            does not read.
    """
    path = _file(path)
    inner = [name.partition("/")[2] for name in _names(path)]
    if "archive_format" not in inner:
        raise ValueError(f"{path} is no archive of torch.export.save, or one from before torch 2.8: save it again")
    if strange := [name for name in inner if not _HARMLESS.fullmatch(name)]:
        raise ValueError(
            f"{path} holds {strange[0]}, which would be run or unpickled: only programs of a graph and tensors are "
            "read; export the module that it was made from"
        )
    try:
        with _tensors_alone():
            module: nn.Module = torch.export.load(path).module()
    except Exception as fault:  # whatever torch makes of a foreign file
        raise ValueError(f"{path} cannot be read by torch {torch.__version__}: {_sentence(fault)}") from fault
    assert isinstance(module, torch.fx.GraphModule)
    size, program = fixed_batch(module.graph), Program(module, path)
    return program if size is None else InPieces(program, size)


def read_torchscript(path: Path | str) -> nn.Module:
    """The module of a file of ``torch.jit.save``, on the CPU and in eval mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file.
    """
    path = _file(path)
    if not any(name.endswith("/constants.pkl") for name in _names(path)):
        raise ValueError(f"{path} is no file of torch.jit.save")
    try:
        module: nn.Module = torch.jit.load(path, map_location="cpu")
    except Exception as fault:  # whatever torch makes of a foreign file
        raise ValueError(f"{path} cannot be read as TorchScript: {_sentence(fault)}") from fault
    return Program(module.eval(), path)


def _file(path: Path | str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return path


def _names(path: Path) -> list[str]:
    return zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []


def _sentence(fault: Exception) -> str:
    return " ".join((str(fault).strip() or type(fault).__name__).split())[:300]


@contextlib.contextmanager
def _tensors_alone() -> Iterator[None]:
    """torch.load takes tensors and nothing else, whatever its caller asks."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _fitted(network: nn.Module, path: Path, shape: Shape, classes: int) -> nn.Module:
    """The network, in pieces of one where it takes no two images; it must answer with a logit per class.

    Raises:
        ValueError: it does not.
    """
    for candidate in (network, InPieces(network)):
        try:
            with torch.no_grad():
                answer: Any = candidate(torch.zeros(2, *shape))
            break
        except Exception as fault:  # the network is foreign, and may fail in any way
            reason = fault
    else:
        raise ValueError(f"{path} does not take images of {tuple(shape)}: {_sentence(reason)}") from reason
    if getattr(answer, "shape", None) != (2, classes):
        found = f"answers of shape {tuple(answer.shape)}" if hasattr(answer, "shape") else type(answer).__name__
        raise ValueError(f"{path} gives {found} for two images, the data have {classes} classes")
    return candidate


class Exported(Model, name="torch-export"):
    """The network of a ``.pt2`` file of torch.export.save, with its weights."""

    path: Path
    """The file."""

    def network(self, input_shape: Shape, num_classes: int) -> nn.Module:
        return _fitted(read_exported(self.path), self.path, input_shape, num_classes)


class TorchScript(Model, name="torchscript"):
    """The module of a file of torch.jit.save, with its weights: attacked, but not seen into by bounds."""

    path: Path
    """The file."""

    def network(self, input_shape: Shape, num_classes: int) -> nn.Module:
        return _fitted(read_torchscript(self.path), self.path, input_shape, num_classes)
