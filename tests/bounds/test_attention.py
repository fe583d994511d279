"""Products, softmax, norms of layers and attention on the way, and a small vision transformer of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast import Threat
from holdfast.bounds import Interval, UnsupportedOperator, bound_margins, bound_outputs
from holdfast.bounds.interval import rule
from holdfast.bounds.linear import both_ways
from holdfast.bounds.normalised import RootMeanSquare
from holdfast.bounds.operators import Operator, Softmax, apply
from holdfast.bounds.products import Product
from holdfast.bounds.relaxation import adaptive, relax
from holdfast.bounds.rounding import Rounding
from holdfast.certify import BranchAndBoundCertifier

METHODS = ("ibp", "crown-ibp", "crown", "alpha-crown")
NEXT = [*range(1, 12), 0]


def turned(v: Tensor) -> Tensor:
    return torch.tanh(v[:, NEXT])


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "product": lambda v: v * turned(v),
    "product that broadcasts": lambda v: v.view(-1, 3, 4) * turned(v).view(-1, 3, 4).mean(2, keepdim=True),
    "product with itself": lambda v: v * v,
    "power": lambda v: v**3,
    "square": lambda v: v.square(),
    "quotient": lambda v: v / (1.5 + turned(v)),
    "reciprocal": lambda v: 2 / (v.exp() + 0.5),
    "log": lambda v: torch.log(v * v + 1),
    "sqrt": lambda v: (v**2 + 0.1).sqrt(),
    "rsqrt": lambda v: torch.rsqrt(v.square() + 0.1),
    "matrices": lambda v: v.view(-1, 3, 4) @ turned(v).view(-1, 3, 4).transpose(1, 2) @ v.view(-1, 3, 4),
    "bmm": lambda v: torch.bmm(v.view(-1, 3, 4), turned(v).view(-1, 4, 3)),
    "softmax": lambda v: F.softmax(v, 1),
    "softmax in rows": lambda v: torch.softmax(v.view(-1, 3, 4), -1),
    "softmax in columns": lambda v: v.view(-1, 3, 4).softmax(1),
    "log_softmax": lambda v: F.log_softmax(v.view(-1, 3, 4), -1),
    "layer_norm": lambda v: F.layer_norm(v, (12,)),
    "layer_norm in rows": lambda v: F.layer_norm(v.view(-1, 3, 4), (4,)),
    "layer_norm of all": lambda v: F.layer_norm(v.view(-1, 3, 4), (3, 4), eps=0.1),
    "rms_norm": lambda v: F.rms_norm(v, (12,), eps=1e-3),
    "attention": lambda v: F.scaled_dot_product_attention(*[t.view(-1, 3, 4) for t in (v, turned(v), v)]),
    "elu": lambda v: F.elu(v, 0.6),
    "selu": F.selu,
    "celu": lambda v: F.celu(v, 0.7),
    "mish": F.mish,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "softplus": lambda v: F.softplus(v, 2.0),
}


class Between(nn.Module):
    """A function between two dense layers."""

    def __init__(self, function: Callable[[Tensor], Tensor], scale: float) -> None:
        super().__init__()
        self.function, self.scale = function, scale
        self.first = nn.Linear(6, 12)
        self.last = nn.Linear(len(function(torch.rand(2, 12)).flatten(1)[0]), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x) * self.scale).flatten(1))


def inside(x: Tensor, eps: float, count: int) -> Tensor:
    """Random points and corners of each example's box, (N, count, ...)."""
    shift = 2 * torch.rand(len(x), count, *x.shape[1:]).double() - 1
    shift[:, ::2] = shift[:, ::2].sign()
    near = (x.double()[:, None] + eps * shift).clamp(0, 1)
    return near.clamp((x.double() - eps)[:, None], (x.double() + eps)[:, None])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_a_network_answers_lies_within_its_bounds(name: str) -> None:
    for scale, eps, dtype in ((1, 0.0, torch.float64), (1, 0.02, torch.float32), (4, 0.2, torch.float64)):
        torch.manual_seed(scale)
        model, x = Between(FUNCTIONS[name], scale).to(dtype), torch.rand(2, 6).to(dtype)
        threat, y = Threat("linf", eps), model(x).argmax(1)
        points = inside(x, eps, 200)
        exact = model.double()(points.flatten(0, 1)).detach().view(2, 200, 3)
        model.to(dtype)
        rows = torch.arange(2)[:, None], torch.tensor([[j for j in range(3) if j != label] for label in y.tolist()])
        margins = (exact.movedim(1, 2)[torch.arange(2), y][:, None] - exact.movedim(1, 2)[rows]).amin(2)
        for method in METHODS:
            settings = {"iterations": 3} if method == "alpha-crown" else {}
            lowest = bound_margins(model, x, y, threat, method, **settings)
            assert lowest.isfinite().all()
            assert (lowest.double() <= margins).all(), method
            if method == "alpha-crown":
                continue
            lower, upper = bound_outputs(model, x, threat, method)
            assert (lower.double()[:, None] <= exact).all(), method
            assert (exact <= upper.double()[:, None]).all(), method
            if eps == 0:
                assert (upper - lower).max() < 1e-10


OPERATORS: dict[str, Operator] = {
    "softmax": Softmax(False, -1),
    "log_softmax": Softmax(True, -1),
    "root mean square": RootMeanSquare(1, 1e-5),
    "product": Product((6,), (6,)),
    "matrices": Product((2, 3), (3, 2), matrices=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPERATORS)
def test_planes_hold_on_narrow_and_wide_intervals(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    operator = OPERATORS[name]
    size, width = 10 ** torch.empty(200, 1).uniform_(-3, 2), 10 ** torch.empty(200, 1).uniform_(-8, 2)
    centre, radius = (torch.randn(200, 12) * size).to(dtype), (torch.rand(200, 12) * width).to(dtype)
    radius[:3] = 0
    centre[1] = 0
    value = Interval.between(centre - radius, centre + radius, Rounding.of(dtype))
    planes, image = relax(operator, value, adaptive), rule(operator, value)
    outputs = image.centre[0].numel()
    everyone = torch.arange(200).repeat_interleave(outputs)
    neuron = torch.arange(outputs).repeat(200)
    a = both_ways(everyone, neuron, tuple(image.centre.shape[1:]), centre)
    many = planes.take(everyone)
    assert many.cost is not None
    slopes, offset = many.pull(a)
    slack = many.cost.of(a).double()
    assert slack.isfinite().all()
    for share in (*torch.rand(30, 200, 12).double(), torch.zeros(200, 12), torch.ones(200, 12)):
        low, high = value.lower.double(), value.upper.double()
        v = (low + share.double().round(decimals=1) * (high - low)).clamp(low, high)
        answers = apply(operator, v)
        assert (image.lower.double() <= answers).all()
        assert (answers <= image.upper.double()).all()
        below = (slopes.double() * v[everyone][:, None]).flatten(2).sum(2) + offset.double()
        true = (a.double() * answers[everyone][:, None]).flatten(2).sum(2)
        assert (below - true <= 0.5 * slack).all()


def test_softmax_planes_do_not_change_where_all_logits_are_shifted() -> None:
    torch.manual_seed(0)
    low = torch.randn(5, 4).double()
    maps = [relax(Softmax(False, 1), Interval.between(low + s, low + s + 1), adaptive) for s in (0, 1000.0)]
    a = torch.randn(5, 3, 4).double()
    for plain, shifted in zip(*(each.pull(a) for each in maps), strict=True):
        if plain.dim() == 3:
            torch.testing.assert_close(plain, shifted)
            torch.testing.assert_close(plain.sum(2), torch.zeros(5, 3).double(), atol=1e-12, rtol=0)


def test_the_interval_of_a_product_is_exact() -> None:
    value = Interval.between(torch.tensor([[0.0, -1.0]]), torch.tensor([[2.0, 3.0]]))
    image = rule(Product((1,), (1,)), value)
    assert (image.lower.item(), image.upper.item()) == (-2.0, 6.0)


def test_what_may_be_outside_a_domain_is_named_with_its_place() -> None:
    class Logged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.log(self.layer(x).abs() + 1e-3 - 0.01)

    with pytest.raises(UnsupportedOperator, match=r"at 'the module itself' \(log\): log is not defined on all of"):
        bound_outputs(Logged(), torch.rand(2, 4), Threat("linf", 1.0))


class Block(nn.Module):
    """Attention of several heads and an MLP, each behind a LayerNorm and beside an identity."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.heads, self.each = heads, width // heads

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        qkv = self.qkv(self.norm1(x)).reshape(-1, tokens, 3, self.heads, self.each).permute(0, 2, 3, 1, 4)
        q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
        weights = (q @ k.transpose(-2, -1) * self.each**-0.5).softmax(dim=-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(-1, tokens, self.heads * self.each))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Patches of 8×8 images, two blocks of two heads, the mean of the tokens."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.place = nn.Parameter(0.1 * torch.randn(1, 4, width))
        self.blocks = nn.Sequential(Block(width, 2), Block(width, 2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.place
        return self.head(self.norm(self.blocks(tokens)).mean(1))


class MultiHead(nn.Module):
    """The module of torch between two dense layers."""

    def __init__(self, *, bias: bool = True, result: int = 0, masked: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, bias=bias)
        self.result, self.mask = result, torch.ones(5, 5).triu(1).bool() if masked else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        results = self.attention(h, h, torch.tanh(h), need_weights=self.result > 0, attn_mask=self.mask)
        return self.last((h + (results[1] @ h if self.result else results[0])).mean(1))


@pytest.mark.parametrize("bias", [True, False])
def test_multi_head_attention_is_bounded(bias: bool) -> None:
    torch.manual_seed(0)
    model, x = MultiHead(bias=bias).double().eval(), torch.rand(2, 5, 4).double()
    answers = model(inside(x, 0.05, 100).flatten(0, 1)).view(2, 100, 3)
    for method in ("ibp", "crown-ibp", "crown"):
        lower, upper = bound_outputs(model, x, Threat("linf", 0.05), method)
        assert (lower[:, None] <= answers).all()
        assert (answers <= upper[:, None]).all()
    assert (upper - lower).max() < 0.2


def test_multi_head_attention_is_refused_with_a_mask_and_for_its_weights() -> None:
    x = torch.rand(2, 5, 4)
    with pytest.raises(UnsupportedOperator, match=r"'attention': .*without a mask"):
        bound_outputs(MultiHead(masked=True).eval(), x, Threat("linf", 0.05))
    with pytest.raises(UnsupportedOperator, match="only the first of several results"):
        bound_outputs(MultiHead(result=1).eval(), x, Threat("linf", 0.05))


def transformer() -> tuple[VisionTransformer, Tensor, Tensor]:
    torch.manual_seed(0)
    model, x = VisionTransformer().eval(), torch.rand(2, 1, 8, 8)
    return model, x, model(x).argmax(1)


def test_a_vision_transformer_is_bounded() -> None:
    model, x, y = transformer()
    widths = {}
    for eps in (1e-3, 2e-2):
        points = inside(x, eps, 100)
        with torch.no_grad():
            answers = VisionTransformer.forward(model.double(), points.flatten(0, 1)).view(2, 100, 3)
        model.float()
        for method in ("ibp", "crown-ibp", "crown"):
            lower, upper = (t.detach().double() for t in bound_outputs(model, x, Threat("linf", eps), method))
            assert (lower[:, None] <= answers).all()
            assert (answers <= upper[:, None]).all()
            assert bound_margins(model, x, y, Threat("linf", eps), method).isfinite().all()
            widths[method, eps] = float((upper - lower).mean())
    assert widths["crown-ibp", 1e-3] <= widths["ibp", 1e-3]
    assert widths["crown", 1e-3] < 1e-2 * widths["crown-ibp", 1e-3]


def test_branch_and_bound_of_a_transformer_is_never_wrong() -> None:
    model, x, y = transformer()
    certifier = BranchAndBoundCertifier(seconds=2)
    small = certifier(model, x, y, Threat("linf", 1e-4))
    assert small.verified.all()
    large = certifier(model, x, y, Threat("linf", 0.3))
    assert not large.verified.any()


def test_squares_that_overflow_are_no_bound() -> None:
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.LayerNorm(2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1e20], [-1e20]]))
    one = torch.ones(1, 1)
    lower, upper = bound_outputs(model, one, (-one, one), method="ibp")
    assert not ((lower > -1) | (upper < 1)).any()
