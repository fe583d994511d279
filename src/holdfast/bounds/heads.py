"""Softmax and log-softmax over the classes, by exact rules: what bounds of the logits say of the network's answer.

Such a head at the very end is taken off the graph, since every method bounds the margins of logits best. With
t_j = z_y − z_j the margin of log-softmax is t_j itself, and that of softmax p_y (1 − exp(−t_j)) with
p_y = 1 / (1 + Σ_k exp(−t_k)): its sign is that of t_j.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.bounds.interval import Interval, rule
from holdfast.bounds.operators import Graph, Softmax


def without_heads(graph: Graph) -> Graph:
    """The graph up to the logits that its last softmax reads, and that softmax among its heads."""
    nodes, heads = graph.nodes, graph.heads
    while isinstance(head := nodes[-1].operator, Softmax) and len(nodes[-1].shape) == 1 and nodes[-1].inputs[0]:
        nodes, heads = nodes[: nodes[-1].inputs[0]], (head, *heads)
    return replace(graph, nodes=nodes, heads=heads)


def margins_after(heads: tuple[Softmax, ...], margins: Tensor) -> Tensor:
    """Lower bounds of the margins behind the heads, from those of the logits before them; (N, K−1) each.

    From t ≥ m follows, for m_j ≥ 0, p_y − p_j ≥ (1 − exp(−m_j)) / (1 + Σ_k exp(−m_k)); for m_j < 0, since
    p_y + p_j ≤ 1, p_y − p_j ≥ tanh(m_j / 2). Both are taken down by their own rounding.
    """
    for head in heads:
        if not head.log:
            total = _softplus(torch.logsumexp(-margins, 1, keepdim=True))  # −log of the least p_y
            slack = torch.finfo(margins.dtype).eps * (margins.shape[1] + 8 + 4 * total.detach())
            above = (-total).exp() * -torch.expm1(-margins.clamp(min=0)) * (1 - slack).clamp(min=0)
            below = torch.tanh(margins.clamp(max=0) / 2) * (1 + 8 * torch.finfo(margins.dtype).eps)
            margins = above + below  # one of them is 0
    return margins


def outputs_after(heads: tuple[Softmax, ...], outputs: Interval) -> Interval:
    """The interval of what the heads make of logits in this interval, (N, K) each."""
    for head in heads:
        outputs = rule(head, outputs)
    return outputs


def constant_of(heads: tuple[Softmax, ...], classes: int) -> float:
    """A Lipschitz constant of the heads from l_2 to l_2.

    The Jacobian diag(p) − p pᵀ of softmax has norm at most ½; that of log-softmax, I − 1 pᵀ, is a projection of
    norm √K ‖p‖₂ ≤ √K.
    """
    return math.prod(math.sqrt(classes) if head.log else 0.5 for head in heads)


@rule.register
def _(operator: Softmax, value: Interval) -> Interval:
    """log p_i = −log(1 + Σ_{k≠i} exp(z_k − z_i)) rises with z_i and falls with the others: exact at two corners."""
    lower, upper = value.lower.movedim(operator.dim, -1), value.upper.movedim(operator.dim, -1)
    classes = lower.shape[-1]
    eps = 2 * value.rounding.unit if value.rounding else torch.finfo(lower.dtype).eps
    slack = eps * (8 * torch.maximum(lower.abs(), upper.abs()).amax(-1, keepdim=True) + classes + 16)
    low = -_others(upper, lower) - slack
    high = (slack - _others(lower, upper)).clamp(max=0)
    if not operator.log:
        tiny = torch.finfo(low.dtype).tiny  # of exponentials that underflow
        low = (low.exp() * (1 - 8 * eps) - tiny).clamp(min=0)
        high = (high.exp() * (1 + 8 * eps) + tiny).clamp(max=1)
    return Interval.between(low.movedim(-1, operator.dim), high.movedim(-1, operator.dim), value.rounding)


def _others(others: Tensor, own: Tensor) -> Tensor:
    """log(1 + Σ_{k≠i} exp(others_k − own_i)) of each i, (..., K) each."""
    gaps = others[..., None, :] - own[..., :, None]
    itself = torch.eye(gaps.shape[-1], dtype=torch.bool, device=gaps.device)
    return _softplus(gaps.masked_fill(itself, -torch.inf).logsumexp(-1))


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); torch's own is x from 20 on, which is wrong by 2e-9."""
    return F.softplus(x, threshold=40)
