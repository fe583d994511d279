"""Balls cut with boxes: the reference arrays, the exact worst translation, operator norms from above."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from holdfast import Threat
from holdfast.bounds import bound_margins, region_of, trace
from holdfast.bounds.ball import ball_margins, cut_balls, lipschitz_margins
from holdfast.bounds.gains import certified_gains, estimated_gains
from holdfast.bounds.specification import margin_rows
from holdfast.norms import L2

INF = math.inf
Nets = dict[str, tuple[nn.Module, dict[str, Tensor]]]
Read = Callable[[str], dict[str, Tensor]]


def margins_of(logits: Tensor, y: Tensor) -> Tensor:
    return (margin_rows(y, logits.shape[1], logits.dtype) @ logits[:, :, None])[:, :, 0]


@pytest.mark.parametrize("name", ["mlp_tiny", "cnn2_tiny"])
@pytest.mark.parametrize("k", [0, 1])
def test_equals_the_original_with_its_operator_norms(certified_nets: Nets, name: str, k: int) -> None:
    model, arrays = certified_nets[name]
    x, y = arrays["x"].double(), arrays["y"]
    threat = Threat("l2", arrays["eps_l2"][k].item(), -INF, INF)
    graph, region = trace(model, x), region_of(x, threat)
    numbers = sorted(n for n in certified_gains(graph, x) if not graph.nodes[n].operator.entrywise)
    gains = certified_gains(graph, x) | dict(zip(numbers, arrays["sigma_power"], strict=True))
    state = cut_balls(graph, region, gains, graph.nodes[-1].inputs[0])[-1]
    prefix = f"l2_{k}__"
    assert torch.allclose(state.centre, arrays[prefix + "mu_prev"], atol=1e-9)
    assert torch.allclose(state.radius, arrays[prefix + "r_prev"].flatten(), atol=1e-9)
    assert torch.allclose(state.box.centre, arrays[prefix + "box_mid_prev"], atol=1e-9)
    assert torch.allclose(state.box.radius, arrays[prefix + "box_rad_prev"], atol=1e-9)
    bcp = ball_margins(graph, region, y, gains).lower
    assert torch.allclose(bcp, margins_of(arrays[prefix + "bcp_logit_it1000"], y), atol=1e-5)
    lmt = lipschitz_margins(graph, region, y, gains).lower
    assert torch.allclose(lmt, margins_of(arrays[prefix + "lmt_logit"], y), atol=1e-9)
    one = margins_of(arrays[prefix + "bcp_logit_it1"], y)
    assert (bcp >= one - 1e-9).all()  # one round of the original's clipping is a looser bound
    certified = bound_margins(model, x, y, threat, "bcp")
    assert (certified <= bcp + 1e-12).all()
    assert torch.allclose(certified, bcp, atol=1e-4)
    if prefix + "pgd100_margin" in arrays:
        assert (certified <= arrays[prefix + "pgd100_margin"]).all()
    published = Threat("linf", arrays["eps_linf"][0].item(), -INF, INF)
    if k == 0 and "bcp_linfty__bcp_logit" in arrays:
        boxed = ball_margins(graph, region_of(x, published), y, gains).lower
        assert torch.allclose(boxed, margins_of(arrays["bcp_linfty__bcp_logit"], y), atol=1e-6)


def test_equals_the_original_with_batch_norm(reference: Read) -> None:
    arrays, inputs = reference("certified_misc"), reference("certified_cnn2_tiny")
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, 1, 1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 4, 2, 1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    weights = {k.removeprefix("bcpbn_param__"): v for k, v in arrays.items() if k.startswith("bcpbn_param__")}
    model.load_state_dict(weights)
    model = model.double().eval()
    x, y = inputs["x"].double(), inputs["y"]
    region = region_of(x, Threat("l2", arrays["bcpbn_eps_l2"].item(), -INF, INF))
    graph = trace(model, x)
    state = cut_balls(graph, region, certified_gains(graph, x), graph.nodes[-1].inputs[0])[-1]
    # Its operator norms come from below, by power iteration.
    assert torch.allclose(state.radius, arrays["bcpbn_r_prev"].flatten(), rtol=1e-5)
    assert (state.radius >= arrays["bcpbn_r_prev"].flatten()).all()
    assert torch.allclose(state.box.centre, arrays["bcpbn_box_mid_prev"], atol=1e-6)
    assert torch.allclose(state.box.radius, arrays["bcpbn_box_rad_prev"], atol=1e-6)
    margins = ball_margins(graph, region, y, certified_gains(graph, x)).lower
    assert torch.allclose(margins, margins_of(arrays["bcpbn_logit"], y), atol=1e-5)


@pytest.mark.parametrize("k", [0, 1])
def test_the_worst_translation_is_the_exact_optimum(certified_nets: Nets, reference: Read, k: int) -> None:
    model, arrays = certified_nets["cnn2_tiny"]
    exact, prefix = reference("certified_misc")[f"ballbox_exact__cnn2_tiny__l2_{k}"], f"l2_{k}__"
    weight = model[-1].weight.detach()
    centre, radius = arrays[prefix + "mu_prev"], arrays[prefix + "r_prev"].flatten()
    middle, half = arrays[prefix + "box_mid_prev"], arrays[prefix + "box_rad_prev"]
    for i in range(10):
        for j in range(10):
            direction = (weight[i] - weight[j]).expand(8, -1)
            room = torch.where(direction > 0, middle + half - centre, centre - middle + half)
            found = L2.support(direction.abs(), radius[:, None], room.clamp(min=0))
            assert torch.allclose(found, exact[:, i, j], rtol=1e-8, atol=1e-12)


def test_estimates_of_operator_norms_come_from_below_and_are_differentiable() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4)).double()
    x = torch.rand(2, 1, 8, 8).double()
    graph = trace(model, x)
    above, below = certified_gains(graph, x), estimated_gains(graph, x, 200)
    assert below[0] <= above[0]
    assert below[0].item() == pytest.approx(above[0].item(), rel=1e-4)

    def norm(weight: Tensor) -> Tensor:
        changed = nn.Conv2d(1, 4, 3, padding=1, bias=False).double()
        return estimated_gains(trace(nn.Sequential(changed, nn.Flatten(), nn.Linear(256, 2).double()), x), x, 300)[
            0
        ]

    (gradient,) = torch.autograd.grad(below[0], model[0].weight)
    step = 1e-6
    with torch.no_grad():
        model[0].weight += step * gradient
    moved = certified_gains(trace(model, x), x)[0]
    assert ((moved - above[0]) / step).item() == pytest.approx(gradient.square().sum().item(), rel=1e-3)
