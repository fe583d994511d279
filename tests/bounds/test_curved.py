"""Lines that touch functions which are convex or concave by pieces."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast import Threat
from holdfast.bounds import Interval, UnsupportedOperator, bound_margins, bound_outputs
from holdfast.bounds.curved import Bent, Curved, Steep, bent
from holdfast.bounds.interval import rule
from holdfast.bounds.kinds import (
    ABS,
    EXP,
    HARDSWISH,
    LOG,
    MISH,
    RECIPROCAL,
    RSQRT,
    SELU,
    SIGMOID,
    SILU,
    SQRT,
    SQUARE,
    TANH,
    between,
    celu,
    elu,
    gelu,
    leaky,
    power,
    softplus,
)
from holdfast.bounds.rounding import Rounding

EVERYWHERE = {
    "sigmoid": SIGMOID,
    "tanh": TANH,
    "silu": SILU,
    "mish": MISH,
    "gelu": gelu(),
    "gelu tanh": gelu("tanh"),
    "selu": SELU,
    "hardswish": HARDSWISH,
    "abs": ABS,
    "elu": elu(0.7),
    "steep elu": elu(1.6),
    "celu": celu(0.5),
    "softplus": softplus(2.0),
    "steep leaky": leaky(1.7),
    "clamp": between(-0.3, 0.4),
    "exp": EXP,
    "square": SQUARE,
    "cube": power(3),
    "fourth power": power(4),
}
POSITIVE = {
    "log": LOG,
    "sqrt": SQRT,
    "rsqrt": RSQRT,
    "power 1.5": power(1.5),
    "power 0.3": power(0.3),
    "power -0.5": power(-0.5),
}
ONE_SIGN = {"reciprocal": RECIPROCAL, "power -2": power(-2), "power -3": power(-3)}
ALL = EVERYWHERE | POSITIVE | ONE_SIGN


def intervals(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Narrow and wide ones, points, and across every bend; (N, 40) each."""
    size = 10 ** torch.empty(120, 1).uniform_(-2, 1.1)
    centre, radius = torch.randn(120, 40) * size, torch.rand(120, 40) * 10 ** torch.empty(120, 1).uniform_(-8, 1.3)
    radius[:2] = 0
    centre[1:4] = 0
    centre, radius = centre.clamp(-30, 30).to(dtype), radius.clamp(max=15).to(dtype)
    if name in EVERYWHERE:
        return centre - radius, centre + radius
    low = centre.abs() + (1e-2 if ALL[name].hole is not None else 0)
    if name in POSITIVE:
        return low, low + 2 * radius
    flip = torch.rand(120, 40) < 0.5
    high = low + 2 * radius
    return torch.where(flip, -high, low), torch.where(flip, -low, high)


def between_ends(lower: Tensor, upper: Tensor, share: Tensor) -> Tensor:
    lower, upper = lower.double(), upper.double()
    return (lower + share * (upper - lower)).clamp(lower, upper)


def excess(each: Bent, places: Tensor | None, lower: Tensor, upper: Tensor) -> Tensor:
    """How far the function leaves its lines on points of the interval, as a share of what they may err by."""
    lines = each.lines(places)
    parts = lines.lower_slope, lines.lower_offset, lines.upper_slope, lines.upper_offset
    slope, offset, above, over = (t.double() if places is not None else t.double()[:, None] for t in parts)
    assert each.cost is not None
    allowed = each.cost.share.double().view(len(lower), 1, -1)
    worst = torch.zeros_like(allowed)
    for share in torch.linspace(0, 1, 33, dtype=torch.float64):
        v = between_ends(lower, upper, share)[:, None]
        f = each.operator.function(v)
        wrong = torch.maximum(slope * v + offset - f, f - above * v - over) / allowed
        worst = torch.maximum(worst, wrong.amax(1, keepdim=True))
    return worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ALL)
def test_the_function_stays_between_its_lines_wherever_they_touch(name: str, dtype: torch.dtype) -> None:
    lower, upper = intervals(name, dtype)
    value = Interval.between(lower, upper, Rounding.of(dtype))
    each = bent(ALL[name], value)
    for places in (None, torch.rand(120, 3, 2, 40, dtype=dtype), torch.zeros(120, 1, 2, 40, dtype=dtype)):
        wrong = excess(each, places, value.lower, value.upper)
        assert wrong.isfinite().all()
        assert wrong.max() <= 0.2  # a margin, since points do not find the worst
    image = rule(ALL[name], value)
    for share in torch.linspace(0, 1, 33, dtype=torch.float64):
        f = ALL[name].function(between_ends(lower, upper, share))
        assert (image.lower.double() <= f).all()
        assert (f <= image.upper.double()).all()


@pytest.mark.parametrize("name", ALL)
def test_pieces_are_bent_as_told(name: str) -> None:
    operator = ALL[name]
    assert isinstance(operator, Curved | Steep)
    ends = (-12.0, *operator.bends.breaks, 12.0) if operator not in POSITIVE.values() else (1e-3, 12.0)
    for low, high, bend in zip(ends[:-1], ends[1:], operator.bends.pieces, strict=True):
        reach = 1e-2 if name in ONE_SIGN else 0.0
        v = torch.linspace(low + reach, high - reach, 4001, dtype=torch.float64)[1:-1]
        f = operator.function(v)
        second = f[2:] - 2 * f[1:-1] + f[:-2]
        slack = 2e-15 * (f.abs().amax() + 1)
        assert (bend * second >= -slack).all() if bend else (second.abs() <= slack).all()
        v.requires_grad_(True)
        slope = torch.autograd.grad(operator.function(v).sum(), v)[0]
        torch.testing.assert_close(operator.bends.derivative(v), slope, rtol=1e-12, atol=1e-12)


def test_lines_of_a_wide_sigmoid_are_far_apart_in_slope() -> None:
    """Below the tangent through the upper end, above that through the lower: by the closed form at −8 and 8."""
    each = bent(SIGMOID, Interval(torch.zeros(1, 1).double(), torch.full((1, 1), 8.0).double()))
    lines = each.lines()
    at = each.below.high  # the touching tangent: f(d) + f'(d) (8 − d) = f(8)
    value, slope = torch.sigmoid(at), SIGMOID.bends.derivative(at)
    torch.testing.assert_close(
        value + slope * (8 - at), torch.sigmoid(torch.tensor([[8.0]]).double()), rtol=0, atol=1e-5
    )
    assert lines.lower_slope > each.chord  # the chord itself is no lower line
    torch.testing.assert_close(lines.lower_slope, lines.upper_slope)  # symmetric about the inflection


def test_a_convex_function_has_its_chord_above_and_the_tangent_at_the_middle_below() -> None:
    lines = bent(SQUARE, Interval.between(torch.tensor([[1.0]]).double(), torch.tensor([[3.0]]).double())).lines()
    assert (lines.upper_slope.item(), lines.upper_offset.item()) == (4.0, -3.0)
    assert lines.lower_offset is not None
    assert (lines.lower_slope.item(), lines.lower_offset.item()) == pytest.approx((4.0, -4.0))


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("log", -0.1, 1.0), ("log", 0.0, 1.0), ("reciprocal", -1.0, 1.0), ("sqrt", -1.0, 1.0), ("power -2", 0.0, 1.0)],
)
def test_an_interval_outside_the_domain_is_refused(name: str, low: float, high: float) -> None:
    value = Interval.between(torch.tensor([[low]]), torch.tensor([[high]]))
    with pytest.raises(UnsupportedOperator, match="not defined on all of"):
        rule(ALL[name], value)
    with pytest.raises(UnsupportedOperator, match="not defined on all of"):
        bent(ALL[name], value)


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Tanh, nn.SiLU, nn.GELU, nn.Mish, nn.Softplus])
def test_margins_hold_and_moved_tangents_beat_those_at_the_middle(activation: type[nn.Module]) -> None:
    model = nn.Sequential(
        nn.Linear(6, 12), activation(), nn.Linear(12, 12), activation(), nn.Linear(12, 3)
    ).double()
    for layer in model[::2]:
        layer.weight.data *= 3
    x, threat = torch.rand(4, 6).double(), Threat("linf", 0.2)
    y = model(x).argmax(1)
    crown = bound_margins(model, x, y, threat, "crown")
    alpha = bound_margins(model, x, y, threat, "alpha-crown")
    assert (alpha >= crown - 1e-9).all()
    assert (alpha > crown + 1e-4).any()
    for _ in range(300):
        logits = model((x + 0.2 * (2 * torch.rand(x.shape) - 1).sign()).clamp(0, 1))
        margins = (logits.gather(1, y[:, None]) - logits).masked_fill(torch.eye(3)[y].bool(), torch.inf)
        assert (margins.amin(1) >= alpha.amin(1)).all()


def test_a_touching_point_is_never_rounded_into_another_piece() -> None:
    """At 3 the slope of hardswish jumps from 1.5 to 1: a tangent of the last piece is no line below the others."""

    class Tilted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([F.hardswish(x) - 1.48 * x, 0 * x], 1)

    low, high = torch.tensor([[-2.506099438095093]]), torch.tensor([[3.0]])
    y = torch.tensor([0])
    found = bound_margins(Tilted(), low, y, (low, high), "alpha-crown", intersect=False, iterations=25)
    grid = (low + (high - low) * torch.linspace(0, 1, 20001)[:, None]).double()
    assert found.item() <= Tilted()(grid)[:, 0].min().item() + 1e-6


def test_an_interval_without_an_end_is_refused_where_a_hole_may_be() -> None:
    class Inverse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.pow(3).reciprocal()

    low, high = torch.tensor([[-1.0], [1e150]], dtype=torch.float64)[:, None]
    with pytest.raises(UnsupportedOperator, match="not defined"):
        bound_outputs(Inverse(), low, (low, high), method="ibp")


def test_the_chord_of_hardsigmoid_goes_from_kink_to_kink() -> None:
    low, high = torch.tensor([[-3.0]]), torch.tensor([[3.0]])
    lower, upper = bound_outputs(nn.Hardsigmoid(), low, (low, high), method="crown", intersect=False)
    assert lower.item() == pytest.approx(0, abs=1e-5)
    assert upper.item() == pytest.approx(1, abs=1e-5)
