"""ONNX networks as modules that torch can run, differentiate, attack and bound."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from holdfast.component import nearest
from holdfast.formats.nodes import OPERATORS
from holdfast.formats.writing import Call, Value, Writer
from holdfast.models import Model
from holdfast.models.model import Shape

VERSIONS = range(7, 24)
"""Operator sets that are read."""


@dataclass(frozen=True)
class OnnxNetwork:
    """What was read from a file."""

    module: nn.Module
    """In eval mode, from inputs (N, ...) to (N, outputs)."""
    input_shape: tuple[int, ...]
    """Of one input, without the batch dimension."""
    outputs: int


def read_onnx(path: Path | str, input_shape: tuple[int, ...] | None = None) -> OnnxNetwork:
    """A network with one input and one output, as a module of torch layers; a chain of layers is a Sequential.

    The file may fix a batch of one, or leave the batch open, or have none: the module takes any batch. Weights are
    parameters in float32, whatever the file holds; shapes that the file computes are computed here, once.

    Args:
        input_shape: of one input as the module is to take it, where it may differ from the file's: a flat input, or
            channels last, are made of images (C, H, W).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such network, or an operator is not read, by node name and type; or onnx is not
            installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        import onnx
        import onnx.inliner
        from google.protobuf.message import DecodeError
    except ImportError as fault:
        raise ValueError("reading ONNX needs onnx: pip install holdfast[verify]") from fault
    try:
        proto = onnx.load(path)
        proto = onnx.inliner.inline_local_functions(proto) if proto.functions else proto
        versions = {domain.domain: domain.version for domain in proto.opset_import}
    except (DecodeError, OSError) as fault:
        raise ValueError(f"{path} cannot be read as ONNX: {fault}") from fault
    version = versions.get("", versions.get("ai.onnx", 0))
    if version not in VERSIONS:
        raise ValueError(
            f"{path} has operator set {version}, read are {VERSIONS[0]} to {VERSIONS[-1]}; "
            "onnx.version_converter.convert_version changes it"
        )
    try:
        return _Reader(proto.graph, version).network(input_shape)
    except ValueError as fault:
        raise ValueError(f"{path}: {fault}") from fault


class _Reader:
    def __init__(self, graph: Any, version: int) -> None:
        from onnx import numpy_helper

        self.graph, self.version = graph, version
        self.values: dict[str, Any] = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
        """What is known so far by name: a Value, or an array that the input does not enter."""
        self.uses = Counter(name for node in graph.node for name in node.input)
        self.uses.update(one.name for one in graph.output)

    def network(self, input_shape: tuple[int, ...] | None) -> OnnxNetwork:
        inputs = [one for one in self.graph.input if one.name not in self.values]
        if len(inputs) != 1 or len(self.graph.output) != 1:
            raise ValueError(
                f"it has {len(inputs)} inputs and {len(self.graph.output)} outputs, expected one of each"
            )
        shape, batched = self._input_shape(inputs[0], input_shape)
        own = shape[1:] if batched else shape
        writer = Writer()
        given = writer.input(own if input_shape is None else input_shape)
        self.values[inputs[0].name] = _arranged(writer, given, own, batched)
        for number, node in enumerate(self.graph.node):
            self._node(writer, node, number)
        result = self.values.get(self.graph.output[0].name)
        if not isinstance(result, Value):
            raise ValueError("its output does not depend on its input")
        result = writer.reshaped(result, (1, math.prod(result.shape)))
        module = as_chain(writer.module(result)).eval()
        return OnnxNetwork(module, tuple(given.sample.shape[1:]), result.sample.shape[1])

    def _input_shape(self, declared: Any, wanted: tuple[int, ...] | None) -> tuple[tuple[int, ...], bool]:
        """The shape with a batch of one where there is a batch, and whether there is."""
        sizes: list[int] = [one.dim_value for one in declared.type.tensor_type.shape.dim]
        batched = len(sizes) > 1 and sizes[0] < 2
        if batched:
            sizes[0] = 1
        if min(sizes, default=0) < 1 and wanted is not None and batched and len(sizes) == len(wanted) + 1:
            sizes = [1, *wanted]
        if min(sizes, default=0) < 1:
            raise ValueError(f"its input {declared.name!r} has no fixed shape: export it with one")
        own = math.prod(sizes)
        if wanted is not None and own != math.prod(wanted):
            raise ValueError(f"it takes inputs of shape {tuple(sizes)}, the images have {tuple(wanted)}")
        return tuple(sizes), batched

    def _node(self, writer: Writer, node: Any, number: int) -> None:
        where = f"node {node.name or number!r} ({node.op_type})"
        missing = [name for name in node.input if name and name not in self.values]
        if missing:
            raise ValueError(f"{where} reads {missing[0]!r}, which nothing before it computes")
        inputs = [self.values[name] if name else None for name in node.input]
        if not any(isinstance(value, Value) for value in inputs) and not _has_graphs(node):
            results = self._constants(node, where)
        else:
            if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
                kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
                raise ValueError(
                    f"{where} is not read: {kind} has no counterpart here ({nearest(kind, OPERATORS)}); export the "
                    "network without it, or give its module as package.module:factory"
                )
            call = Call(
                writer,
                f"{node.op_type.lower()}_{number}",
                inputs,
                _attributes(node),
                self.version,
                len(node.output),
                [self.uses[name] for name in node.input],
            )
            if any(self.uses[name] for name in node.output[1:]) and node.op_type not in ("Split",):
                raise ValueError(f"{where} is not read with more than one of its outputs in use")
            try:
                made = OPERATORS[node.op_type](call)
            except (ValueError, RuntimeError, IndexError, NotImplementedError) as fault:
                raise ValueError(f"{where} is not read: {' '.join(str(fault).split())}") from fault
            results = made if isinstance(made, list) else [made]
        self.values.update(zip(node.output, results, strict=False))

    def _constants(self, node: Any, where: str) -> list[Any]:
        from onnx.reference import ReferenceEvaluator

        feeds = {name: self.values[name] for name in node.input if name}
        try:
            return list(ReferenceEvaluator(node, opsets={node.domain: self.version}).run(None, feeds))
        except Exception as fault:  # whatever the reference makes of a foreign node
            raise ValueError(f"{where} cannot be computed: {' '.join(str(fault).split())}") from fault


def _has_graphs(node: Any) -> bool:
    return any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)


def _attributes(node: Any) -> dict[str, Any]:
    from onnx.helper import get_attribute_value

    found = {attribute.name: get_attribute_value(attribute) for attribute in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}


def _arranged(writer: Writer, given: Value, own: tuple[int, ...], batched: bool) -> Value:
    """The module's input in the shape of the file's: flat, or channels last."""
    shape = tuple(given.sample.shape[1:])
    if len(shape) == 3 and own == (*shape[1:], shape[0]):
        given = writer.function(torch.permute, given, (0, 2, 3, 1))
    return writer.reshaped(given, (1, *own) if batched else own)


def as_chain(module: fx.GraphModule) -> nn.Module:
    """A Sequential, where each layer reads the one before it and nothing else."""
    *nodes, _ = module.graph.nodes
    chain = [node.op == "call_module" and node.args == (before,) for before, node in pairwise(nodes)]
    if not all(chain):
        return module
    return nn.Sequential(OrderedDict((str(node.target), module.get_submodule(node.target)) for node in nodes[1:]))


class Onnx(Model, name="onnx"):
    """The network of an ONNX file, with its weights (needs holdfast[verify])."""

    path: Path
    """The file."""

    def network(self, input_shape: Shape, num_classes: int) -> nn.Module:
        found = read_onnx(self.path, input_shape)
        if found.outputs != num_classes:
            raise ValueError(f"{self.path} has {found.outputs} outputs, the data {num_classes} classes")
        return found.module
