"""Tracing foreign modules: what is understood, and what is refused by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import images
from torch import Tensor, nn

from holdfast import Threat
from holdfast.attacks import PGD
from holdfast.bounds import Monotone, UnsupportedOperator, batch_statistics, bound_outputs, register, trace
from holdfast.bounds.rules import MODULES


class Residual(nn.Module):
    """A user's network: residual block, BatchNorm, functional calls, pooling, shape arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.block, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 4)
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(0.5, 2)

    def body(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return x + F.leaky_relu(self.block(x), 0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.body(x), 1)
        return self.head(x.view(x.size(0), -1))


class ConcatenatingMean(Residual):
    def forward(self, x: Tensor) -> Tensor:
        x = 2 * (x - 0.5) / 0.25 + 0.1
        x = self.body(x)
        return self.head(torch.cat([x.mean((2, 3))[:, None], x.flatten(2).mean(-1)[:, None]], 1).mean(1))


class ControlFlow(Residual):
    """Symbolic tracing cannot follow the assertion; export can."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 1
        if x.shape[2] > 100:
            x = x[:, :, :100]
        return super().forward(x)


class TwiceTheSame(Residual):
    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        return z + z - z * 0.5


class Subclass(Residual):
    """A convolution with a forward of its own must not pass for a plain one."""

    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight - 0.125
            return F.conv2d(x, weight, self.bias, padding=1)

    def __init__(self) -> None:
        super().__init__()
        self.block = self.Standardised(4, 4, 3, padding=1)


class Broadcasting(Residual):
    """A constant map added to pooled features: the radius must spread with the values."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.randn(1, 4, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).mean((2, 3), keepdim=True) + self.map
        return self.head(self.block(x).mean((2, 3)))


class ByOtherNames(Residual):
    """Calls by keyword, a matrix product, a clamp, a negation, an auxiliary branch that is not used."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(input=x, weight=self.stem.weight, padding=1)
        x = -torch.cat(tensors=[x.clamp(min=0), x], dim=1)[:, :4]
        x *= 0.5
        x = x.mean((2, 3))
        answer = F.linear(input=x @ self.head.weight.T, weight=self.head.weight)
        self.head(x)
        return answer


class Transposing(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).permute(0, 2, 3, 1).flatten(1, 2).transpose(1, 2).mean(2).contiguous())


@pytest.mark.parametrize(
    "kind",
    [
        *[Residual, ConcatenatingMean, ControlFlow, TwiceTheSame, Subclass, Transposing],
        *[Broadcasting, ByOtherNames],
    ],
    ids=lambda k: k.__name__,
)
def test_foreign_modules_are_bounded_soundly_and_exactly_at_a_point(kind: type[nn.Module]) -> None:
    model, (x, y), threat = kind().train(), images(6), Threat("linf", 0.05)
    lower, upper = bound_outputs(model, x, Threat("linf", 0.0), arithmetic=None)
    assert all(module.training for module in model.modules())
    model.eval()
    assert torch.allclose(lower, model(x), atol=1e-5)
    assert torch.allclose(upper, model(x), atol=1e-5)
    lower, upper = bound_outputs(model, x, threat)
    for seed in range(5):
        points = threat.project(x, x + threat.eps * torch.randn(x.shape).sign())
        for point in (points, PGD(steps=5)(model, x, y, threat, seed=seed).x_adv):
            assert (lower - 1e-5 <= model(point)).all()
            assert (model(point) <= upper + 1e-5).all()
        logits = model(PGD(steps=5)(model, x, y, threat, seed=seed).x_adv)
        assert (lower - 1e-5 <= logits).all()
        assert (logits <= upper + 1e-5).all()


def test_bounds_are_differentiable_in_the_parameters() -> None:
    model, (x, _) = Residual(), images(3)
    lower, _ = bound_outputs(model, x, Threat("linf", 0.1))
    lower.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_integer_constants_have_a_positive_size() -> None:
    class Scaled(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.tensor([-128], dtype=torch.int8))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * self.scale / self.scale)

    model, (x, _) = Scaled().eval(), images(4)
    lower, upper = bound_outputs(model, x, Threat("linf", 0.1))
    assert (lower < model(x)).all()
    assert (model(x) < upper).all()


def test_one_example_is_no_way_to_mix_a_batch() -> None:
    class AcrossTheBatch(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0, keepdim=True))

    with pytest.raises(UnsupportedOperator, match="batch"):
        bound_outputs(AcrossTheBatch(), images(1)[0], Threat("linf", 0.1))


def test_parametrised_weights_are_read_afresh() -> None:
    model, (x, _) = Residual(), images(3)
    nn.utils.parametrizations.weight_norm(model.head)
    before, _ = bound_outputs(model, x, Threat("linf", 0.1))
    with torch.no_grad():
        model.head.parametrizations.weight.original0.mul_(2)
    after, _ = bound_outputs(model, x, Threat("linf", 0.1))
    assert not torch.allclose(before, after)


def refused(model: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedOperator, match=message):
        trace(model, images(4)[0])


def test_an_unknown_operator_is_named_with_its_module_path() -> None:
    class Wave(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(x)

    inner = nn.Sequential(nn.Linear(64, 8), Wave(), nn.Linear(8, 4))
    refused(nn.Sequential(nn.Flatten(), inner), r"'1\.1' \(sin\): operator sin is unknown; .*register\(sin")
    refused(nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Softmin(1)), "'2': operator Softmin is unknown")


def test_a_registered_operator_is_understood_and_only_once() -> None:
    class Rising(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x.sinh()

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), Rising())
    refused(model, "sinh")
    try:
        register(Rising, Monotone)
        lower, upper = bound_outputs(model, images(4)[0], Threat("linf", 0.1))
        assert (lower <= upper).all()
        with pytest.raises(ValueError, match="already"):
            register(Rising, Monotone)
    finally:
        MODULES.pop(Rising, None)


def test_what_a_trace_could_get_silently_wrong_is_refused() -> None:
    hooked = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    hooked[1].register_forward_hook(lambda module, args, output: output + 1)
    refused(hooked, "forward hooks")

    class InPlace(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head((torch.relu_(x) + x).mean((2, 3)))

    refused(InPlace(), "in place on a value that is read again")

    class Accumulating(Residual):
        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            skip = h
            h += F.relu(self.block(h))
            return self.head((h - skip).mean((2, 3)))

    refused(Accumulating(), "in place on a value that is read again")

    class InPlaceOfAView(Residual):
        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            F.relu_(h.flatten(1))
            return self.head(h.mean((2, 3)))

    refused(InPlaceOfAView(), "in place on a value that is read again")

    class InPlaceOfAnAlias(Residual):
        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            kept = self.identity(h)
            return self.head((F.hardtanh(h, 0, 6, inplace=True) + kept).mean((2, 3)))

    aliasing = InPlaceOfAnAlias()
    aliasing.identity = nn.Identity()
    refused(aliasing, "in place on a value that is read again")

    class OnlyWhenBright(Residual):
        """Symbolic tracing does not see the branch, and most inputs do not take it."""

        def forward(self, x: Tensor) -> Tensor:
            if isinstance(x, Tensor):
                x = x.clamp(max=0.9)
            return super().forward(x)

    bright = torch.cat([torch.zeros(3, 1, 8, 8), torch.ones(1, 1, 8, 8)])
    with pytest.raises(UnsupportedOperator, match="do not reproduce its output"):
        trace(OnlyWhenBright(), bright)
    with pytest.raises(UnsupportedOperator, match="do not reproduce its output"):
        bound_outputs(OnlyWhenBright(), 0 * bright, Threat("linf", 1.0))

    patched = Residual()
    patched.stem.forward = lambda x: x.expand(-1, 4, -1, -1)  # type: ignore[method-assign]
    refused(patched, "forward of 'stem' was replaced")
    rooted = Residual()
    rooted.register_forward_hook(lambda module, args, output: output + 1)
    refused(rooted, "forward hooks")

    class Offset(InPlaceOfAnAlias):
        """A large constant in the logits must not hide a difference."""

        def forward(self, x: Tensor) -> Tensor:
            if isinstance(x, Tensor):
                x = x.clamp(max=0.9)
            return Residual.forward(self, x) + 1000

    with pytest.raises(UnsupportedOperator, match="do not reproduce its output"):
        trace(Offset(), bright)

    class AlwaysDropping(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.dropout(self.body(x), 0.001).mean((2, 3)))

    refused(AlwaysDropping(), "drops in eval mode too")

    class OfTheBatchSize(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.ones(x.shape))

    refused(OfTheBatchSize(), "size of the batch")

    class FirstExamples(ControlFlow):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[1] == 1
            return Residual.forward(self, x[: len(x)])

    refused(FirstExamples(), "selects among the examples")
    refused(nn.Sequential(nn.AvgPool2d(8, divisor_override=-2), nn.Flatten(), nn.Linear(1, 4)), "divisor -2")
    refused(nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Softplus(threshold=0)), "jumps down")

    class AcrossTheBatch(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0, keepdim=True))

    refused(AcrossTheBatch(), "batch")
    refused(nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4, track_running_stats=False)), "mixes")
    refused(nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.LeakyReLU(-0.1)), "not monotone")

    class Pair(Residual):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(x), x

    refused(Pair(), "one tensor of logits")

    class DataDependent(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else super().forward(-x)

    refused(DataDependent(), "cannot be traced")

    model, (x, _) = DataDependent().train(), images(4)
    with batch_statistics(model) as statistics:
        model(x)
    with pytest.raises(UnsupportedOperator, match="batch statistics of DataDependent"):
        trace(model, x, statistics)


def test_a_forward_that_branches_on_shapes_is_bounded_on_batch_statistics() -> None:
    (x, _), graphs = images(4), []
    for model in (Residual().train(), ControlFlow().train()):
        with batch_statistics(model) as statistics:
            model(x)
        graphs.append([type(node.operator) for node in trace(model, x, statistics).nodes])
    assert graphs[0] == graphs[1]
