"""Small reference networks of the local-Lipschitz and the data-scaling line."""

from __future__ import annotations

from collections import OrderedDict

from pydantic import PositiveInt
from torch import nn

from holdfast.models.model import Model, Shape


def _valid(side: int, kernel: int = 3, pool: int = 1) -> int:
    """What an unpadded convolution and a pooling leave of a side."""
    return (side - kernel + 1) // pool


def _too_small(input_shape: Shape) -> ValueError:
    return ValueError(f"images of {input_shape[1]} × {input_shape[2]} are too small for this network")


class CNN001(Model, name="cnn001"):
    """Two convolutions (32, 64) and 128 hidden units with Dropout: the first MNIST network of Yang et al. (2020).

    1,199,882 parameters on MNIST. As in the original, no ReLU stands between the second convolution and its
    pooling.
    """

    def network(self, input_shape: Shape, num_classes: int) -> nn.Module:
        channels, *size = input_shape
        height, width = (_valid(_valid(side), pool=2) for side in size)
        if min(height, width) < 1:
            raise _too_small(input_shape)
        return nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(channels, 32, 3),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(32, 64, 3),
                pool=nn.MaxPool2d(2),
                dropout1=nn.Dropout2d(0.25),
                flatten=nn.Flatten(),
                fc1=nn.Linear(64 * height * width, 128),
                relu2=nn.ReLU(),
                dropout2=nn.Dropout(0.5),
                fc2=nn.Linear(128, num_classes),
            )
        )


class CNN002(Model, name="cnn002"):
    """Four convolutions (32, 32, 64, 64) and two hidden layers of 200: SmallCNN of TRADES (Zhang et al., 2019).

    312,202 parameters on MNIST. Convolutions start Kaiming-normal with zero bias, and the last layer starts
    at zero, so that the input gradient of a fresh network vanishes.
    """

    def network(self, input_shape: Shape, num_classes: int) -> nn.Module:
        channels, *size = input_shape
        height, width = (_valid(_valid(_valid(_valid(side), pool=2)), pool=2) for side in size)
        if min(height, width) < 1:
            raise _too_small(input_shape)
        features = OrderedDict(
            conv1=nn.Conv2d(channels, 32, 3),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(32, 32, 3),
            relu2=nn.ReLU(),
            maxpool1=nn.MaxPool2d(2),
            conv3=nn.Conv2d(32, 64, 3),
            relu3=nn.ReLU(),
            conv4=nn.Conv2d(64, 64, 3),
            relu4=nn.ReLU(),
            maxpool2=nn.MaxPool2d(2),
        )
        classifier = OrderedDict(
            fc1=nn.Linear(64 * height * width, 200),
            relu1=nn.ReLU(),
            drop=nn.Dropout(0.5),
            fc2=nn.Linear(200, 200),
            relu2=nn.ReLU(),
            fc3=nn.Linear(200, num_classes),
        )
        for layer in features.values():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        nn.init.zeros_(classifier["fc3"].weight)  # type: ignore[arg-type]
        nn.init.zeros_(classifier["fc3"].bias)  # type: ignore[arg-type]
        return nn.Sequential(
            OrderedDict(
                feature_extractor=nn.Sequential(features),
                flatten=nn.Flatten(),
                classifier=nn.Sequential(classifier),
            )
        )


class SimpleConvNet(Model, name="simple-conv-net"):
    """Eight convolutions with BatchNorm and ReLU: the unconstrained network of Prach & Lampert (2024).

    4,692,416 parameters on CIFAR-10. In the blocks that halve the resolution the max-pooling stands before
    the BatchNorm. A last pooling takes the maximum over what is left of the image.
    """

    width: PositiveInt = 64
    """Channels of the first block."""

    def network(self, input_shape: Shape, num_classes: int) -> nn.Module:
        if min(input_shape[1:]) < 8:
            raise _too_small(input_shape)
        channels, blocks = input_shape[0], []
        for out, pools in [
            (1, False),
            (1, False),
            (2, True),
            (2, False),
            (4, True),
            (4, False),
            (8, True),
            (8, False),
        ]:
            layers: list[nn.Module] = [nn.Conv2d(channels, out * self.width, 3, padding=1, bias=False)]
            layers += [nn.MaxPool2d(2)] if pools else []
            blocks.append(nn.Sequential(*layers, nn.BatchNorm2d(out * self.width), nn.ReLU()))
            channels = out * self.width
        head = nn.Linear(channels, num_classes, bias=False)
        return nn.Sequential(*blocks, nn.AdaptiveMaxPool2d(1), nn.Flatten(), head)
