"""Which operator a module is. What has no rule is refused by name, never skipped."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.bounds.activations import SMOOTH_MODULES
from holdfast.bounds.calls import SAME, Lowered
from holdfast.bounds.functions import FUNCTIONS
from holdfast.bounds.kinds import (
    ABS,
    RELU,
    SIGMOID,
    SILU,
    TANH,
    average_pool_with,
    between,
    elu,
    gelu,
    leaky,
    max_pool_of,
    scaled_to,
    softplus,
    transposed_convolution,
)
from holdfast.bounds.operators import (
    Affine,
    Convolution,
    Linear,
    LipschitzMap,
    Operator,
    PairwiseMax,
    Softmax,
    UnsupportedOperator,
    moved,
    positive,
)
from holdfast.bounds.twins import TWINS
from holdfast.fold import BATCH_NORMS
from holdfast.layers import (
    Abs,
    AOLConv2d,
    AOLLinear,
    BatchCentering,
    BCOPConv2d,
    BjorckLinear,
    BROConv2d,
    BROLinear,
    CayleyConv2d,
    CayleyLinear,
    CPLConv2d,
    CPLLinear,
    FirstChannels,
    GroupSort,
    Householder,
    L2NormPool2d,
    LinearResidualConv2d,
    LOTConv2d,
    MaxMin,
    NActivation,
    Normalize,
    NormalizedLinear,
    SandwichConv2d,
    SandwichLinear,
    SLLConv2d,
    SLLLinear,
    SOCConv2d,
    ZeroChannelConcatenation,
)
from holdfast.layers.lipschitz import AffineConv2d, AffineLinear, LipschitzLayer, convolve


def _convolution(module: Any) -> Operator:
    if module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return Convolution(
            module.weight, module.bias, module.stride, module.padding, module.dilation, module.groups
        )
    return Affine(  # _conv_forward applies the module's own padding mode
        lambda x: module._conv_forward(x, module.weight, module.bias),
        lambda radius: module._conv_forward(radius, module.weight.abs(), None),
        summands=_products(module.weight, module.padding_mode, module._reversed_padding_repeated_twice[::2]),
    )


def _products(weight: Tensor, mode: str, padding: Sequence[int]) -> int:
    """At most so many products make an entry of a padded convolution, or of its adjoint: an entry of the input is
    there up to three times along an axis, or as often as the borders are wide."""
    copies = math.prod(1 + 2 * p if mode == "replicate" else 3 for p in padding)
    return max(weight[0].numel(), weight[:, 0].numel() * copies)


def _transposed_convolution(module: Any) -> Operator:
    rest = module.stride, module.padding, module.output_padding, module.groups, module.dilation
    return transposed_convolution(module.weight, module.bias, rest)


def _upsampling(module: nn.Upsample) -> Operator:
    if module.mode == "bicubic":
        raise UnsupportedOperator("bicubic interpolation has negative weights, for which there is no rule")
    return positive(module)


def _max_pool_module(module: Any) -> Operator:
    if module.return_indices:
        raise UnsupportedOperator("max-pooling that returns indices has no rule")
    function: Any = F.max_pool1d if isinstance(module, nn.MaxPool1d) else F.max_pool2d
    rest = module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode, True
    dims = 1 if isinstance(module, nn.MaxPool1d) else 2
    return max_pool_of(module.kernel_size, module.stride, module.dilation, dims, lambda x: function(x, *rest))


def _normalize(module: Normalize) -> Operator:
    return Affine(module, lambda radius: radius / scaled_to(radius, module.std), entrywise=True)


def _effective_convolution(module: AffineConv2d) -> Operator:
    kernel = module.effective_weight()
    if module.padding_mode == "zeros" and not (module.unshuffles and module.stride > 1):
        padding = tuple(side // 2 for side in module.kernel_size)
        return Convolution(
            kernel, module.bias, (module.stride,) * 2, padding, (1, 1), 1, norm=module.lipschitz_bound
        )
    stride = 1 if module.unshuffles else module.stride
    return Affine(
        lambda x: convolve(module.unshuffled(x), kernel, module.bias, module.padding_mode, stride),
        lambda radius: convolve(module.unshuffled(radius), kernel.abs(), None, module.padding_mode, stride),
        norm=module.lipschitz_bound,
        summands=_products(kernel, module.padding_mode, [side // 2 for side in module.kernel_size]),
    )


def _effective_linear(module: AffineLinear) -> Operator:
    return Linear(module.effective_weight(), module.bias, norm=module.lipschitz_bound)


def _bounded(module: LipschitzLayer) -> Operator:
    return LipschitzMap(module, module.lipschitz_bound())


def _one_lipschitz(module: nn.Module) -> Operator:
    return LipschitzMap(module, 1.0)


def _centering(module: BatchCentering) -> Operator:
    mean = module.running_mean
    return Affine(lambda x: x - scaled_to(x, mean), lambda radius: radius, entrywise=True)


def _average_pool_module(module: nn.AvgPool2d) -> Operator:
    return average_pool_with(module.divisor_override, module)


MODULES: dict[type[nn.Module], Callable[[Any], Lowered]] = {
    nn.Linear: lambda module: Linear(module.weight, module.bias),
    Normalize: _normalize,
    MaxMin: lambda module: PairwiseMax(module),
    GroupSort: lambda module: PairwiseMax(module) if module.size == 2 else _one_lipschitz(module),
    Abs: lambda module: ABS,
    BatchCentering: _centering,
    **dict.fromkeys([AOLConv2d, BCOPConv2d, LinearResidualConv2d], _effective_convolution),
    **dict.fromkeys([AOLLinear, BjorckLinear, BROLinear, CayleyLinear, NormalizedLinear], _effective_linear),
    **dict.fromkeys(
        [
            CPLConv2d,
            CPLLinear,
            SLLConv2d,
            SLLLinear,
            SOCConv2d,
            BROConv2d,
            CayleyConv2d,
            LOTConv2d,
            SandwichConv2d,
            SandwichLinear,
        ],
        _bounded,
    ),
    **dict.fromkeys([Householder, NActivation, L2NormPool2d], _one_lipschitz),
    **dict.fromkeys([FirstChannels, ZeroChannelConcatenation], moved),
    **dict.fromkeys([nn.Conv1d, nn.Conv2d], _convolution),
    **dict.fromkeys([nn.ConvTranspose1d, nn.ConvTranspose2d], _transposed_convolution),
    nn.ReLU: lambda module: RELU,
    nn.LeakyReLU: lambda module: leaky(module.negative_slope),
    nn.ELU: lambda module: elu(module.alpha),
    nn.ReLU6: lambda module: between(0.0, 6.0),
    nn.Hardtanh: lambda module: between(module.min_val, module.max_val),
    nn.Sigmoid: lambda module: SIGMOID,
    nn.Tanh: lambda module: TANH,
    nn.SiLU: lambda module: SILU,
    nn.GELU: lambda module: gelu(module.approximate),
    nn.Softplus: lambda module: softplus(module.beta, module.threshold),
    **SMOOTH_MODULES,
    nn.Softmax: lambda module: Softmax(False, 1 if module.dim is None else module.dim),
    nn.LogSoftmax: lambda module: Softmax(True, 1 if module.dim is None else module.dim),
    nn.AvgPool2d: lambda module: _average_pool_module(module),
    nn.Upsample: _upsampling,
    **dict.fromkeys([nn.MaxPool1d, nn.MaxPool2d], _max_pool_module),
    **dict.fromkeys([nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d], positive),
    **dict.fromkeys([nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle], moved),
    **dict.fromkeys([nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d], positive),
    **dict.fromkeys(
        [
            nn.Identity,
            nn.Dropout,
            nn.Dropout1d,
            nn.Dropout2d,
            nn.Dropout3d,
            nn.AlphaDropout,
            nn.FeatureAlphaDropout,
        ],
        lambda module: SAME,  # bounds are those of the network in eval mode
    ),
}
"""Operator of a leaf module, by its exact type; BatchNorm apart, which needs the statistics of the pass."""


REGISTERED: set[Any] = set()
"""The kinds whose rules came from a user, and are tried (see ``holdfast.bounds.trial``)."""


def register(kind: Any, rule: Callable[[Any], Operator]) -> None:
    """Teach the bounds a module class or a function.

    What a certificate is worth then hangs on the rule too. When first used it is tried on random and structured
    inputs; one that does not hold is refused by name, but a trial proves nothing.

    >>> from holdfast.bounds import Monotone, register
    >>> register(torch.nn.LogSigmoid, Monotone)  # doctest: +SKIP
    >>> register(torch.erf, Monotone)  # doctest: +SKIP
    >>> register(torch.Tensor.erf, Monotone)  # doctest: +SKIP

    Args:
        kind: a module class; or a function as it is called in a forward, a method by ``torch.Tensor``'s.
        rule: from the module, or the traced ``Call``, to its operator. Both can be called with one tensor.

    Raises:
        ValueError: there is a rule already.
    """
    rules: dict[Any, Callable[[Any], Lowered]] = MODULES if isinstance(kind, type) else FUNCTIONS
    if kind in rules or kind in BATCH_NORMS or kind in TWINS:
        raise ValueError(f"{kind!r} has a bound rule already")
    rules[kind] = rule
    REGISTERED.add(kind)
