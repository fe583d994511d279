"""Foreign files in: ONNX networks, VNN-LIB properties."""

from holdfast.formats.onnx import Onnx, OnnxNetwork, read_onnx
from holdfast.formats.vnnlib import Property, Query, read_vnnlib

__all__ = ["Onnx", "OnnxNetwork", "Property", "Query", "read_onnx", "read_vnnlib"]
