"""Architectures: each a file."""

from holdfast.models.cnn import CNN4C3F, CNNSmall
from holdfast.models.mlp import MLP
from holdfast.models.model import Model, build

__all__ = ["CNN4C3F", "MLP", "CNNSmall", "Model", "build"]
