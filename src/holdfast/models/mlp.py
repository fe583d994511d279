"""Multi-layer perceptron."""

from __future__ import annotations

import math
from itertools import pairwise

from pydantic import PositiveInt
from torch import nn

from holdfast.models.model import Model, Shape


class MLP(Model, name="mlp"):
    """Dense layers with ReLU between."""

    hidden: list[PositiveInt] = [256, 256]
    """Widths of the hidden layers."""

    def network(self, input_shape: Shape, num_classes: int) -> nn.Module:
        widths = [math.prod(input_shape), *self.hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for width, following in pairwise(widths):
            layers += [nn.Linear(width, following), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))
