"""Calls of which a transformer is made: products of activations, softmax, norms of layers, attention."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.bounds.calls import Argument, Call, Rows, Several, Steps
from holdfast.bounds.normalised import layer_norm, rms_norm
from holdfast.bounds.operators import Affine, Linear, Operator, Shape, Softmax, UnsupportedOperator, moved
from holdfast.bounds.products import Product, joined
from holdfast.bounds.softmax import SOFTMAX


def _attention(call: Call) -> Operator:
    """softmax(q kᵀ · scale + mask) v."""

    def rule(
        query: Argument,
        key: Argument,
        value: Argument,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Operator:
        if attn_mask is not None or is_causal or enable_gqa or dropout_p:
            raise UnsupportedOperator("attention with a mask, dropout or shared heads has no rule")
        if not all(isinstance(each, Argument) for each in (query, key, value)):
            raise UnsupportedOperator("attention to constants has no rule")
        q, k, v = (tuple(each.value.shape[1:]) for each in (query, key, value))
        return Steps(tuple(_attended(q, k, v, scale)))

    return rule(*call.args, **call.kwargs)


def _attended(q: Shape, k: Shape, v: Shape, scale: float | None = None) -> list[tuple[Operator, tuple[int, ...]]]:
    """The steps of attention of q (..., T, d), k (..., U, d) and v (..., U, e), whose numbers are 0, 1 and 2."""
    factor = 1 / math.sqrt(q[-1]) if scale is None else scale
    turned = moved(lambda x: x.transpose(-1, -2))
    scaled = Affine(lambda x: x * factor, lambda r: r * abs(factor), entrywise=True)
    scores = joined(Product(q, (*k[:-2], k[-1], k[-2]), matrices=True), 3, 4, 5)
    mixed = joined(Product((*q[:-1], k[-2]), v, matrices=True), 9, 2, 10)
    return [(scaled, (0,)), (turned, (1,)), *scores.steps, (Softmax(False, -1), (8,)), *mixed.steps]


def multihead_attention(
    module: nn.MultiheadAttention, args: Sequence[object], settings: Mapping[str, object]
) -> Several:
    """What a module makes of query, key and value (N, T, E); its weights have no rule.

    Args:
        settings: what else it is called with.
    """
    shapes = [tuple(each.value.shape[1:]) for each in args if isinstance(each, Argument)]
    if not module.batch_first or module.bias_k is not None or module.add_zero_attn or module.in_proj_weight is None:
        raise UnsupportedOperator(
            "multi-head attention has a rule with batch_first, one width and neither bias_kv nor a zero of its own"
        )
    masks = (settings.get(name) for name in ("key_padding_mask", "attn_mask", "is_causal"))
    plain = all(mask is None or mask is False for mask in masks)
    if not plain or not len(args) == len(shapes) == 3 or any(len(shape) != 2 for shape in shapes):
        raise UnsupportedOperator("multi-head attention has a rule on q, k and v (N, T, E) alone, without a mask")
    heads, width = module.num_heads, module.head_dim
    weights = module.in_proj_weight.chunk(3)
    biases = (None, None, None) if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    apart = moved(lambda x: x.unflatten(-1, (heads, width)).transpose(1, 2))
    together = moved(lambda x: x.transpose(1, 2).flatten(2))
    steps: list[tuple[Operator, tuple[int, ...]]] = [
        (Linear(weight, bias), (number,)) for number, (weight, bias) in enumerate(zip(weights, biases, strict=True))
    ]
    steps += [(apart, (number,)) for number in (3, 4, 5)]
    q, k, v = ((heads, shape[0], width) for shape in shapes)
    inner = _attended(q, k, v)
    steps += [(operator, tuple(number + 6 for number in numbers)) for operator, numbers in inner]
    steps.append((together, (2 + len(steps),)))
    steps.append((Linear(module.out_proj.weight, module.out_proj.bias), (2 + len(steps),)))
    return Several((Steps(tuple(steps)), None))


_aten = torch.ops.aten
ATTENTION: Rows = [
    *SOFTMAX,
    (layer_norm, [F.layer_norm, torch.layer_norm, _aten.layer_norm.default]),
    (rms_norm, [F.rms_norm, _aten.rms_norm.default]),
    (_attention, [F.scaled_dot_product_attention, _aten.scaled_dot_product_attention.default]),
]
