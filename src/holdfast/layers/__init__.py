"""Layers that the field needs and torch does not have."""

from holdfast.layers.maxmin import MaxMin
from holdfast.layers.normalize import Normalize
from holdfast.layers.operator_norm import operator_norm

__all__ = ["MaxMin", "Normalize", "operator_norm"]
