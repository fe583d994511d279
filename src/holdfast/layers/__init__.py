"""Layers that the field needs and torch does not have."""

from holdfast.layers.activations import Abs, GroupSort, Householder, MaxMin, NActivation
from holdfast.layers.aol import AOLConv2d, AOLLinear
from holdfast.layers.bro import BROConv2d, BROLinear
from holdfast.layers.cayley import CayleyConv2d, CayleyLinear, SandwichConv2d, SandwichLinear
from holdfast.layers.channels import BatchCentering, FirstChannels, L2NormPool2d, ZeroChannelConcatenation
from holdfast.layers.heads import LinearResidualConv2d, NormalizedLinear
from holdfast.layers.lipschitz import LipschitzLayer, freeze, shared_weights
from holdfast.layers.lot import LOTConv2d
from holdfast.layers.normalize import Normalize
from holdfast.layers.operator_norm import operator_norm
from holdfast.layers.orthogonal import BCOPConv2d, BjorckLinear
from holdfast.layers.pieces import InPieces
from holdfast.layers.residual import CPLConv2d, CPLLinear, SLLConv2d, SLLLinear
from holdfast.layers.soc import SOCConv2d

__all__ = [
    "AOLConv2d",
    "AOLLinear",
    "Abs",
    "BCOPConv2d",
    "BROConv2d",
    "BROLinear",
    "BatchCentering",
    "BjorckLinear",
    "CPLConv2d",
    "CPLLinear",
    "CayleyConv2d",
    "CayleyLinear",
    "FirstChannels",
    "GroupSort",
    "Householder",
    "InPieces",
    "L2NormPool2d",
    "LOTConv2d",
    "LinearResidualConv2d",
    "LipschitzLayer",
    "MaxMin",
    "NActivation",
    "Normalize",
    "NormalizedLinear",
    "SLLConv2d",
    "SLLLinear",
    "SOCConv2d",
    "SandwichConv2d",
    "SandwichLinear",
    "ZeroChannelConcatenation",
    "freeze",
    "operator_norm",
    "shared_weights",
]
