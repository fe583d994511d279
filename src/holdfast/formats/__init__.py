"""Foreign files in: networks of ONNX, torch.export and TorchScript, VNN-LIB properties."""

from holdfast.formats.onnx import Onnx, OnnxNetwork, read_onnx
from holdfast.formats.programs import Exported, TorchScript, read_exported, read_torchscript
from holdfast.formats.vnnlib import Property, Query, read_vnnlib

__all__ = [
    "Exported",
    "Onnx",
    "OnnxNetwork",
    "Property",
    "Query",
    "TorchScript",
    "read_exported",
    "read_onnx",
    "read_torchscript",
    "read_vnnlib",
]
