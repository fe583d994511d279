"""Architectures: each a file."""

from holdfast.models.classic import CNN001, CNN002, SimpleConvNet
from holdfast.models.cnn import (
    CNN4C3F,
    CNN6C2F,
    CNN7,
    CNN8C2F,
    CNN1Layer,
    CNN2Layer,
    CNN3Layer,
    CNN4Layer,
    CNN10Layer,
    CNNSmall,
    DMLarge,
)
from holdfast.models.external import Factory, Timm
from holdfast.models.features import Features, features
from holdfast.models.lipschitz import AOLLCN, AOLMLP, CPLLCN, LipschitzConvNet, LiResNet
from holdfast.models.mlp import MLP
from holdfast.models.model import Model, build
from holdfast.models.nearest_neighbour import NearestNeighbour
from holdfast.models.resnet import (
    PreActResNet18,
    PreActResNet34,
    PreActResNet50,
    ResNet18,
    ResNet50,
    ResNet101,
    ResNet152,
)
from holdfast.models.vgg import VGG11, VGG13, VGG16, VGG19
from holdfast.models.weights import load_weights
from holdfast.models.wide_resnet import WideResNet

__all__ = [
    "AOLLCN",
    "AOLMLP",
    "CNN001",
    "CNN002",
    "CNN4C3F",
    "CNN6C2F",
    "CNN7",
    "CNN8C2F",
    "CPLLCN",
    "MLP",
    "VGG11",
    "VGG13",
    "VGG16",
    "VGG19",
    "CNN1Layer",
    "CNN2Layer",
    "CNN3Layer",
    "CNN4Layer",
    "CNN10Layer",
    "CNNSmall",
    "DMLarge",
    "Factory",
    "Features",
    "LiResNet",
    "LipschitzConvNet",
    "Model",
    "NearestNeighbour",
    "PreActResNet18",
    "PreActResNet34",
    "PreActResNet50",
    "ResNet18",
    "ResNet50",
    "ResNet101",
    "ResNet152",
    "SimpleConvNet",
    "Timm",
    "WideResNet",
    "build",
    "features",
    "load_weights",
]
