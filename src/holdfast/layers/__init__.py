"""Layers that the field needs and torch does not have."""

from holdfast.layers.normalize import Normalize

__all__ = ["Normalize"]
