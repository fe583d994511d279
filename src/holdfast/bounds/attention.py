"""Calls of which a transformer is made: products of activations, softmax, norms of layers, attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.bounds.calls import Argument, Call, Rows, Steps
from holdfast.bounds.normalised import layer_norm, rms_norm
from holdfast.bounds.operators import Affine, Operator, Softmax, UnsupportedOperator, moved
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
        factor = 1 / math.sqrt(q[-1]) if scale is None else scale
        turned = moved(lambda x: x.transpose(-1, -2))
        scaled = Affine(lambda x: x * factor, lambda r: r * abs(factor), entrywise=True)
        weights = (*q[:-1], k[-2])
        scores = joined(Product(q, (*k[:-2], k[-1], k[-2]), matrices=True), 3, 4, 5)
        mixed = joined(Product(weights, v, matrices=True), 9, 2, 10)
        steps = [(scaled, (0,)), (turned, (1,)), *scores.steps, (Softmax(False, -1), (8,)), *mixed.steps]
        return Steps(tuple(steps))

    return rule(*call.args, **call.kwargs)


_aten = torch.ops.aten
ATTENTION: Rows = [
    *SOFTMAX,
    (layer_norm, [F.layer_norm, torch.layer_norm, _aten.layer_norm.default]),
    (rms_norm, [F.rms_norm, _aten.rms_norm.default]),
    (_attention, [F.scaled_dot_product_attention, _aten.scaled_dot_product_attention.default]),
]
